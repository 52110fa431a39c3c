"""A pool of KV blocks in the words of NIXL: its memory, descriptors, what peers are told of it."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import TransferError
from kvtransfer.transport import Piece

_METADATA = struct.Struct("<8sQIQI")
_MAGIC = b"DIPTYCHN"
_HOST = 0xFFFFFFFF
METADATA_BYTES = _METADATA.size
"""Of what `NixlPool.pack` makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlPool:
    """Where a pool lies, in the words of NIXL."""

    base_address: int
    num_blocks: int
    block_bytes: int
    device_id: int | None

    @property
    def mem_type(self) -> str:
        """NIXL's name of the kind of memory."""
        return "DRAM" if self.device_id is None else "VRAM"

    @property
    def region(self) -> tuple[int, int, int, str]:
        """(address, bytes, device, tag) of the whole pool."""
        return (self.base_address, self.num_blocks * self.block_bytes, self.device_id or 0, "")

    def descriptors(self, runs: Sequence[tuple[int, int]]) -> NDArray[np.uint64]:
        """One row for each (offset, bytes) of a block, standing for that run of every block.

        Returns:
            (address, bytes, device, stride, count) of NIXL's strided lists, [num_runs, 5]. The run
            r of block b has the index r * num_blocks + b.
        """
        table = np.empty((len(runs), 5), dtype=np.uint64)
        table[:, 0] = [self.base_address + offset for offset, _ in runs]
        table[:, 1] = [num_bytes for _, num_bytes in runs]
        table[:, 2:] = (self.device_id or 0, self.block_bytes, self.num_blocks)
        return table

    def pack(self) -> bytes:
        """For the metadata."""
        device = _HOST if self.device_id is None else self.device_id
        return _METADATA.pack(_MAGIC, self.base_address, self.num_blocks, self.block_bytes, device)

    @classmethod
    def unpack(cls, data: bytes) -> "NixlPool":
        """What `pack` made; raises TransferError for anything else."""
        try:
            magic, base_address, num_blocks, block_bytes, device = _METADATA.unpack_from(data)
        except struct.error as error:
            raise TransferError(f"Not the metadata of a NIXL transport: {error}.") from error
        if magic != _MAGIC or not (base_address and num_blocks and block_bytes):
            raise TransferError("Not the metadata of a NIXL transport that this version knows.")
        return cls(
            base_address=base_address,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            device_id=None if device == _HOST else device,
        )


def cut_pieces(pieces: Sequence[Piece], most: int) -> tuple[Piece, ...]:
    """The same bytes in pieces of at most `most`."""
    return tuple(
        Piece(remote + start, own + start, min(most, num_bytes - start))
        for remote, own, num_bytes in pieces
        for start in range(0, num_bytes, most)
    )
