"""What a Mooncake peer needs to know of a pool. Packed by its transport, unpacked by its readers.

Invariant: the bytes are a peer's, so every field is checked before Mooncake is given it.
"""

import ipaddress
import struct
from dataclasses import dataclass

from core.errors import TransferError

NONCE_BYTES = 32
_MAGIC = b"DIPTYCHM"
_METADATA = struct.Struct(f"<8sQIQQ{NONCE_BYTES}s4sH")
_ADDRESS_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakePool:
    """Where a pool lies and who serves it."""

    base_address: int
    num_blocks: int
    block_bytes: int
    nonce_address: int
    nonce: bytes
    """Names one lifetime of the pool; it is read from `nonce_address` when connecting, so that
    another process that was given the same port is not taken for the one that was meant."""
    host: ipaddress.IPv4Address
    port: int

    @property
    def target(self) -> str:
        """What Mooncake calls the serving engine."""
        return f"{self.host}:{self.port}"

    def pack(self) -> bytes:
        """For the metadata."""
        return _METADATA.pack(
            _MAGIC,
            self.base_address,
            self.num_blocks,
            self.block_bytes,
            self.nonce_address,
            self.nonce,
            self.host.packed,
            self.port,
        )

    @classmethod
    def unpack(cls, data: bytes) -> "MooncakePool":
        """What `pack` made; raises TransferError for anything else."""
        try:
            magic, base, num_blocks, block_bytes, nonce_address, nonce, host, port = (
                _METADATA.unpack(data)
            )
        except struct.error as error:
            raise TransferError(f"Not the metadata of a Mooncake transport: {error}.") from error
        if magic != _MAGIC or not (base and num_blocks and block_bytes and nonce_address and port):
            raise TransferError("Not the metadata of a Mooncake transport that this version knows.")
        if max(base + num_blocks * block_bytes, nonce_address + NONCE_BYTES) > _ADDRESS_LIMIT:
            raise TransferError("The metadata of a Mooncake transport name impossible addresses.")
        return cls(
            base_address=base,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            nonce_address=nonce_address,
            nonce=nonce,
            host=ipaddress.IPv4Address(host),
            port=port,
        )
