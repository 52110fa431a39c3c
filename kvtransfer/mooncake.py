"""KV transfer over Mooncake's transfer engine: READs over RDMA where there is some, else over TCP.

One engine serves the pool; each peer is read by an engine of its own, in a thread of its own, since
Mooncake has no way to cancel a READ: only the end of its engine ends it (docs/transports.md).
Invariant: a READ is seen FAILED only after the engine that did it is gone.

Access: Mooncake asks nobody who they are. Whoever reaches its ports can read and write the pool, so
this transport is used only where it was asked for by name, on a network without strangers. The
token seals the metadata, so that a peer's bytes reach Mooncake only if a holder of it made them.
"""

import hashlib
import hmac
import ipaddress
import logging
import secrets
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from core.errors import TransferError
from kvtransfer.mooncake_channel import MAX_CONNECTING, MooncakeChannel
from kvtransfer.mooncake_engine import load_mooncake, new_engine, register
from kvtransfer.mooncake_metadata import NONCE_BYTES, MooncakePool
from kvtransfer.peer_reads import PeerPool, Peers, QueuedRead
from kvtransfer.transport import BlockPieces, BlockPool, Piece

log = logging.getLogger(__name__)

_SEAL_BYTES = hashlib.sha256().digest_size
MAX_BLOCKS_PER_READ = 1 << 20


class MooncakeTransport:
    """`transport.Transport` over Mooncake's transfer engine."""

    def __init__(self, pool: BlockPool, *, host: str, token: bytes) -> None:
        """Make `pool` readable and ready to be filled.

        Args:
            pool: host memory, or with Mooncake's CUDA wheel device memory; kept alive until the
                transport is gone.
            host: IPv4 address of this machine at which peers reach it.
            token: shared secret, equal on all workers; empty where there is none.

        Raises:
            TransferError: Mooncake is not installed or can't use the host or the memory.
        """
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError as error:
            raise TransferError(
                f"Mooncake listens on IPv4 only, not on {host}: set advertise_host to an IPv4 "
                "address, or kv_transport to nixl or tcp."
            ) from error
        self._api = load_mooncake()
        if pool.device_id is not None and not self._api.SUPPORT_CUDA:
            raise TransferError(
                "This build of Mooncake moves host memory only: install "
                "mooncake-transfer-engine instead of its -non-cuda variant, or set kv_transport "
                "to nixl."
            )
        log.warning(
            "Whoever reaches Mooncake's ports, on any interface, can read and write the KV pool: "
            "keep strangers off the network (docs/transports.md)"
        )
        self._token = token
        self._pool = pool
        self._nonce = np.frombuffer(secrets.token_bytes(NONCE_BYTES), dtype=np.uint8).copy()
        self._served: Any = new_engine(self._api, host)
        self._own = MooncakePool(
            base_address=pool.base_address,
            num_blocks=pool.num_blocks,
            block_bytes=pool.layout.block_bytes,
            nonce_address=self._nonce.ctypes.data,
            nonce=self._nonce.tobytes(),
            host=address,
            port=self._served.get_rpc_port(),
        )
        register(self._served, pool.base_address, pool.num_blocks * pool.layout.block_bytes)
        register(self._served, self._own.nonce_address, NONCE_BYTES)
        content = self._own.pack()
        self._metadata = self._seal(content) + content
        self._peers = Peers(pool)
        self._slots = threading.Semaphore(MAX_CONNECTING)

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "mooncake"

    def metadata(self) -> bytes:
        """Where the pool lies and who serves it, sealed."""
        return self._metadata

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        """Start connecting. If the peer can't be reached, its READs fail."""
        seal, content = metadata[:_SEAL_BYTES], metadata[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(content)):
            raise TransferError(
                f"The transport metadata of peer {peer_id} are not Mooncake's, or were sealed with "
                "another token; give both workers the same."
            )
        peer = MooncakePool.unpack(content)

        def open_channel(checked: Sequence[Piece]) -> MooncakeChannel:
            return MooncakeChannel(
                self._api, own=self._own, peer=peer, pieces=checked, slots=self._slots
            )

        self._peers.add(peer_id, PeerPool(peer.num_blocks, peer.block_bytes), pieces, open_channel)

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> QueuedRead:
        """Queue a READ behind the peer's earlier ones."""
        return self._peers.read(peer_id, pairs, MAX_BLOCKS_PER_READ)

    def disconnect(self, peer_id: str) -> None:
        """Destroy the engine that reads this peer."""
        self._peers.remove(peer_id)

    def close(self) -> None:
        """Disconnect all peers, stop serving. Idempotent."""
        self._peers.close()
        self._served = None

    def _seal(self, content: bytes) -> bytes:
        return hmac.digest(self._token, content, "sha256")
