"""What a role sees of the transports below it: one worker that reads from another, ranks and all.

`rank_transport.py` is the one of a worker of a single rank, and every rank's part of a larger one;
`ranked_transport.py` is rank 0's, which tells the others. Called by the engine loop's thread.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from core.kv_layout import KvLayout
from kvtransfer.transport import Read, ReadState


class WorkerTransport(Protocol):
    """Moves blocks between workers. Raises core.errors.TransferError where it can't go on."""

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        ...

    @property
    def rank_metadata(self) -> tuple[bytes, ...]:
        """What a peer needs in order to read the pool of each rank, by rank."""
        ...

    def connect(self, peer_id: str, layout: KvLayout, rank_metadata: Sequence[bytes]) -> None:
        """Make a peer readable. A peer id names one connection; it is never used again.

        Args:
            peer_id: name of the connection.
            layout: of the peer's blocks, with the heads of all its ranks.
            rank_metadata: of each of its ranks.
        """
        ...

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> Read:
        """Start copying blocks into every rank's pool: (peer's block id, own block id) each."""
        ...

    def stamp(self, block_id: int, name: str) -> None:
        """Put the stamp of `name` into an own block, on every rank."""
        ...

    def bears(self, block_id: int, name: str) -> bool:
        """True if an own block holds the stamp of `name` on every rank."""
        ...

    def disconnect(self, peer_id: str) -> None:
        """Drop a peer. On return no rank writes anything of its pending reads any more.

        Waits for own ranks, never for the peer; a rank that does not answer ends the engine.
        Nothing to do for a peer that is not connected.
        """
        ...

    def check(self) -> None:
        """Raise what ends the engine if a rank was lost."""
        ...

    def close(self) -> None:
        """Drop all peers and free everything. Idempotent."""
        ...


class JoinedRead:
    """A READ in several parts. Invariant: seen FAILED only when no part can write any more."""

    def __init__(self, parts: Sequence[Read], give_up: Callable[[], None]) -> None:
        """Of these parts; `give_up` drops the peer, so that what is pending fails.

        It need not wait; it is called once, if a part fails.
        """
        self._pending = list(parts)
        self._give_up = give_up
        self.error = ""
        self.duration_s = 0.0

    def poll(self) -> ReadState:
        """Look, don't wait."""
        had_failed = bool(self.error)
        self._look()
        if self.error and not had_failed:
            self._give_up()
            self._look()
        if self._pending:
            return ReadState.PENDING
        return ReadState.FAILED if self.error else ReadState.DONE

    def _look(self) -> None:
        pending = []
        for part in self._pending:
            match part.poll():
                case ReadState.PENDING:
                    pending.append(part)
                case ReadState.DONE:
                    self.duration_s = max(self.duration_s, part.duration_s)
                case ReadState.FAILED:
                    self.error = self.error or part.error or "it did not say why"
        self._pending = pending
