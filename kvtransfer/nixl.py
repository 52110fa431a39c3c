"""KV transfer over NIXL (UCX): one-sided READs over shared memory, RDMA, NVLink or TCP.

One agent serves the pool; each peer is read by an agent of its own, in a thread of its own, because
only the end of an agent ends its READs: over UCX's TCP emulation the bytes of a frozen peer still
landed in the local block after the transfer and the descriptor lists had been released, the remote
agent removed and the memory deregistered (nixl-cu12 1.5.1; docs/adr/0003-leases.md). Invariant: a
READ is seen FAILED only after the agent that did it is gone.

Access: whoever was given the metadata over the authenticated link can read the pool. The token
seals the metadata, so that nothing else reaches NIXL's parser; keep strangers off the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from core.errors import TransferError
from kvtransfer.nixl_agent import load_nixl, new_agent
from kvtransfer.nixl_channel import NixlChannel
from kvtransfer.nixl_pool import METADATA_BYTES, NixlPool, cut_pieces
from kvtransfer.peer_reads import PeerPool, Peers, QueuedRead
from kvtransfer.sealing import open_sealed, seal
from kvtransfer.transport import BlockPieces, BlockPool, Piece

MAX_DESCRIPTORS = (1 << 31) - 1
"""NIXL's indices are signed 32-bit numbers."""
MAX_BLOCKS_PER_READ = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlReader:
    """What it takes to read one peer by NIXL."""

    api: ModuleType
    own: NixlPool
    peer_id: str
    peer: NixlPool
    peer_metadata: bytes
    descriptor_bytes: int

    @property
    def pool(self) -> PeerPool:
        """Size of the peer's pool."""
        return PeerPool(self.peer.num_blocks, self.peer.block_bytes)

    def channel(self, pieces: Sequence[Piece]) -> NixlChannel:
        """A channel that reads these pieces of every block.

        Raises:
            TransferError: they are more than NIXL can number.
        """
        cut = cut_pieces(pieces, self.descriptor_bytes)
        if len(cut) * max(self.own.num_blocks, self.peer.num_blocks) > MAX_DESCRIPTORS:
            raise TransferError(
                f"Blocks of peer {self.peer_id} take {len(cut)} descriptors each, more than NIXL "
                "can number; use a larger descriptor_bytes."
            )
        return NixlChannel(
            self.api,
            own=self.own,
            peer=self.peer,
            peer_metadata=self.peer_metadata,
            pieces=cut,
        )


class NixlTransport:
    """`transport.Transport` over NIXL's UCX backend."""

    def __init__(
        self, pool: BlockPool, *, token: bytes, descriptor_bytes: int | None = None
    ) -> None:
        """Make `pool` readable and ready to be filled.

        Args:
            pool: host or device memory; kept alive until the transport is gone.
            token: shared secret, equal on all workers; empty where there is none.
            descriptor_bytes: most bytes of one descriptor, of which a READ may have many per block;
                None: no limit.

        Raises:
            TransferError: NIXL is not installed or can't use the memory, or no byte is allowed.
        """
        if descriptor_bytes is not None and descriptor_bytes < 1:
            raise TransferError(f"descriptor_bytes must be at least 1, got {descriptor_bytes}.")
        self._descriptor_bytes = descriptor_bytes or pool.layout.block_bytes
        self._api = load_nixl()
        self._token = token
        self._own = NixlPool(
            base_address=pool.base_address,
            num_blocks=pool.num_blocks,
            block_bytes=pool.layout.block_bytes,
            device_id=pool.device_id,
        )
        self._pool = pool
        self._peers = Peers(pool)
        self._served: Any = new_agent(self._api, self._own, serves=True)
        content = self._own.pack() + bytes(self._served.get_agent_metadata())
        self._metadata = seal(content, token)

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "nixl"

    def metadata(self) -> bytes:
        """Where the pool lies and the serving agent's own metadata, sealed."""
        return self._metadata

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        """Start connecting. If the peer can't be reached, its READs fail."""
        reader = self.reader_of(peer_id, metadata)
        self._peers.add(peer_id, reader.pool, pieces, reader.channel)

    def reader_of(self, peer_id: str, metadata: bytes) -> NixlReader:
        """A way to read one peer, not connected yet.

        Raises:
            TransferError: the metadata are not NIXL's, or not of a holder of the token.
        """
        content = open_sealed(metadata, self._token, library="NIXL", peer_id=peer_id)
        return NixlReader(
            api=self._api,
            own=self._own,
            peer_id=peer_id,
            peer=NixlPool.unpack(content),
            peer_metadata=content[METADATA_BYTES:],
            descriptor_bytes=self._descriptor_bytes,
        )

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> QueuedRead:
        """Queue a READ behind the peer's earlier ones."""
        return self._peers.read(peer_id, pairs, MAX_BLOCKS_PER_READ)

    def disconnect(self, peer_id: str) -> None:
        """Destroy the agent that reads this peer."""
        self._peers.remove(peer_id)

    def close(self) -> None:
        """Disconnect all peers, stop serving. Idempotent."""
        self._peers.close()
        self._served = None
