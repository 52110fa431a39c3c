"""One rank's part in moving blocks: reads its own heads from the ranks of a peer that hold them.

Made on every rank; for a worker of one rank it is all there is. One thread calls it.
"""

from collections.abc import Sequence

from core.errors import TransferError
from core.kv_layout import KvLayout
from kvtransfer.head_slices import plan_slices
from kvtransfer.stamps import Stamps
from kvtransfer.transport import Transport
from kvtransfer.worker_transport import JoinedRead


class RankTransport:
    """Implements WorkerTransport for one rank."""

    def __init__(
        self,
        transport: Transport,
        layout: KvLayout,
        stamps: Stamps,
        *,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Take a rank's transport.

        Args:
            transport: of this rank's pool.
            layout: of the whole model's blocks.
            stamps: in the same pool.
            rank: which one this is.
            size: how many ranks the worker has.
        """
        self._transport = transport
        self._layout = layout
        self._stamps = stamps
        self._rank = rank
        self._size = size
        self._sources: dict[str, list[str]] = {}
        """Peer to the names of its ranks that are read."""

    @property
    def name(self) -> str:
        """See WorkerTransport."""
        return self._transport.name

    @property
    def rank_metadata(self) -> tuple[bytes, ...]:
        """Of this rank alone."""
        return (self._transport.metadata(),)

    def connect(self, peer_id: str, layout: KvLayout, rank_metadata: Sequence[bytes]) -> None:
        """See WorkerTransport."""
        if peer_id in self._sources:
            raise TransferError(f"Peer {peer_id} is connected already.")
        slices = plan_slices(
            self._layout,
            layout,
            source_size=len(rank_metadata),
            own_size=self._size,
            own_rank=self._rank,
        )
        names = self._sources[peer_id] = []
        try:
            for each in slices:
                name = f"{peer_id}/{each.source_rank}"
                self._transport.connect(name, rank_metadata[each.source_rank], each.pieces)
                names.append(name)
        except TransferError:
            self.disconnect(peer_id)
            raise

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> JoinedRead:
        """See WorkerTransport."""
        names = self._sources.get(peer_id)
        if names is None:
            raise TransferError(f"Peer {peer_id} is not connected.")
        try:
            parts = [self._transport.read(name, pairs) for name in names]
        except TransferError:
            # Parts that were started are of no use, and nobody would wait for them.
            self.disconnect(peer_id)
            raise
        return JoinedRead(parts, lambda: self.disconnect(peer_id))

    def stamp(self, block_id: int, name: str) -> None:
        """See WorkerTransport; this rank's heads."""
        self._stamps.write(block_id, name)

    def bears(self, block_id: int, name: str) -> bool:
        """See WorkerTransport; this rank's heads."""
        return self._stamps.holds(block_id, name)

    def disconnect(self, peer_id: str) -> None:
        """See WorkerTransport."""
        for name in self._sources.pop(peer_id, ()):
            self._transport.disconnect(name)

    def check(self) -> None:
        """See WorkerTransport. There is no other rank to lose."""

    def close(self) -> None:
        """See WorkerTransport."""
        self._sources.clear()
        self._transport.close()
