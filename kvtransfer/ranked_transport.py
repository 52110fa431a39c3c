"""Moves blocks between workers for rank 0, which moves its own heads and tells the other ranks.

Their half is `rank_service.py`. Called by the engine loop's thread. Invariant: a READ has ended
only when every rank has said so, and a peer is let go only when every rank has; a rank that does
not say so in time is given up, and the engine with it, since it might still write.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, Protocol

from core.clock import monotonic
from core.errors import TransferError, WorkerLostError
from core.kv_layout import KvLayout
from kvtransfer.rank_transport import RankTransport
from kvtransfer.transport import ReadState
from kvtransfer.wire import layout_to_proto
from kvtransfer.worker_transport import JoinedRead
from rpc.v1 import kv_ranks_pb2 as pb

log = logging.getLogger(__name__)

LET_GO_S = 10.0
"""Longest that a rank may take to drop a peer, which takes it milliseconds."""
STAMP_S = 2.0
"""Longest that the engine waits for its other ranks' part of a probe, which takes milliseconds."""
_OPEN_S = 60.0
_SHUT_S = 5.0


class OtherRanks(Protocol):
    """Ranks 1 and up. Every call but `count` raises WorkerLostError once one is lost."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def send(self, message: bytes) -> None:
        """Send to each of them, in order."""
        ...

    def receive(self, timeout_s: float = 0.0) -> list[tuple[int, bytes]]:
        """(rank, message) of all that came; waits at most `timeout_s` for the first."""
        ...

    def fail(self, reason: str) -> NoReturn:
        """Give them up."""
        ...


class _RankRead:
    """Another rank's part of a READ."""

    def __init__(self, hear: Callable[[], None]) -> None:
        self._hear = hear
        self._state = ReadState.PENDING
        self.error = ""
        self.duration_s = 0.0

    def poll(self) -> ReadState:
        """Look, don't wait."""
        if self._state is ReadState.PENDING:
            self._hear()
        return self._state

    def end(self, ended: pb.RankReadEnded, rank: int) -> None:
        self.duration_s = ended.duration_s
        self.error = f"rank {rank}: {ended.error}" if ended.error else ""
        self._state = ReadState.FAILED if ended.error else ReadState.DONE


class RankedTransport:
    """Implements WorkerTransport for a worker of several ranks."""

    def __init__(
        self, own: RankTransport, ranks: OtherRanks, opening: pb.RankOpen, *, let_go_s: float
    ) -> None:
        """Let every rank serve its pool.

        Args:
            own: rank 0's part, whose end this one's is.
            ranks: the others.
            opening: how they open their transports.
            let_go_s: longest that a rank may take to drop a peer.

        Raises:
            TransferError: a rank can't serve its pool.
            WorkerLostError: a rank is lost.
        """
        self._own = own
        self._ranks = ranks
        self._let_go_s = let_go_s
        self._everyone = frozenset(range(1, ranks.count + 1))
        self._peers: set[str] = set()
        self._next_number = 1
        self._reads: dict[int, dict[int, _RankRead]] = {}
        """READs by number and rank, until that rank has ended its part."""
        self._awaited: dict[int, set[int]] = {}
        """Number of a disconnect to the ranks that have not answered it."""
        self._stamped: dict[int, dict[int, pb.RankStamped]] = {}
        """Number of a stamp to what each rank has said of it; of those that somebody waits for."""
        self._opened: dict[int, pb.RankOpened] = {}
        self._shut: set[int] = set()
        self._closed = False
        self._tell(pb.RankCommand(open=opening))
        if not self._wait(lambda: self._opened.keys() == self._everyone, _OPEN_S):
            late = sorted(self._everyone - self._opened.keys())
            raise TransferError(f"Ranks {late} did not open their KV transports in {_OPEN_S:.0f} s")
        for rank, opened in sorted(self._opened.items()):
            if opened.error:
                raise TransferError(f"Rank {rank} can't move its KV: {opened.error}")

    @property
    def name(self) -> str:
        """See WorkerTransport."""
        return self._own.name

    @property
    def rank_metadata(self) -> tuple[bytes, ...]:
        """See WorkerTransport."""
        others = (self._opened[rank].metadata for rank in sorted(self._everyone))
        return (*self._own.rank_metadata, *others)

    def connect(self, peer_id: str, layout: KvLayout, rank_metadata: Sequence[bytes]) -> None:
        """See WorkerTransport. What another rank can't connect to fails its READs."""
        self._own.connect(peer_id, layout, rank_metadata)
        self._peers.add(peer_id)
        connect = pb.RankConnect(
            peer_id=peer_id, layout=layout_to_proto(layout), rank_metadata=rank_metadata
        )
        self._tell(pb.RankCommand(connect=connect))

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> JoinedRead:
        """See WorkerTransport."""
        local = self._own.read(peer_id, pairs)
        number = self._number()
        parts = {rank: _RankRead(self._hear) for rank in sorted(self._everyone)}
        self._reads[number] = dict(parts)
        read = pb.RankRead(
            number=number,
            peer_id=peer_id,
            remote_ids=[remote for remote, _ in pairs],
            own_ids=[own for _, own in pairs],
        )
        self._tell(pb.RankCommand(read=read))

        def give_up() -> None:
            self._begin_disconnect(peer_id)

        return JoinedRead([local, *parts.values()], give_up)

    def stamp(self, block_id: int, name: str) -> None:
        """See WorkerTransport."""
        self._own.stamp(block_id, name)
        self._stamp_others(block_id, name, look=False)

    def bears(self, block_id: int, name: str) -> bool:
        """See WorkerTransport."""
        others = self._stamp_others(block_id, name, look=True)
        return self._own.bears(block_id, name) and others

    def _stamp_others(self, block_id: int, name: str, *, look: bool) -> bool:
        """Have every other rank stamp a block, or look; True if all hold the stamp.

        Raises:
            TransferError: a rank does not say.
        """
        number = self._number()
        answers = self._stamped[number] = {}
        stamp = pb.RankStamp(number=number, block_id=block_id, name=name, look=look)
        self._tell(pb.RankCommand(stamp=stamp))
        try:
            if not self._wait(lambda: answers.keys() == self._everyone, STAMP_S):
                late = sorted(self._everyone - answers.keys())
                raise TransferError(f"Ranks {late} did not stamp a block in {STAMP_S:.0f} s.")
        finally:
            del self._stamped[number]
        for rank, answer in sorted(answers.items()):
            if answer.error:
                raise TransferError(f"Rank {rank} can't stamp a block: {answer.error}")
        return all(answer.holds for answer in answers.values())

    def disconnect(self, peer_id: str) -> None:
        """See WorkerTransport."""
        if peer_id not in self._peers:
            return
        self._peers.remove(peer_id)
        number = self._begin_disconnect(peer_id)
        awaited = self._awaited[number]
        if not self._wait(lambda: not awaited, self._let_go_s):
            self._ranks.fail(
                f"Ranks {sorted(awaited)} did not let go of peer {peer_id} within "
                f"{self._let_go_s:.0f} s and might still write into KV blocks."
            )

    def check(self) -> None:
        """See WorkerTransport."""
        self._hear()

    def close(self) -> None:
        """See WorkerTransport."""
        if self._closed:
            return
        self._closed = True
        with suppress(WorkerLostError):
            self._tell(pb.RankCommand(shut=pb.RankShut()))
        self._own.close()
        with suppress(WorkerLostError):
            if not self._wait(lambda: self._shut == self._everyone, _SHUT_S):
                log.warning("not every rank has closed its KV transport in %.0f s", _SHUT_S)

    def _begin_disconnect(self, peer_id: str) -> int:
        """Let every rank drop a peer; the number under which they say that they did."""
        number = self._number()
        self._awaited[number] = set(self._everyone)
        disconnect = pb.RankDisconnect(number=number, peer_id=peer_id)
        self._tell(pb.RankCommand(disconnect=disconnect))
        self._own.disconnect(peer_id)
        return number

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _tell(self, command: pb.RankCommand) -> None:
        self._ranks.send(command.SerializeToString())

    def _wait(self, until: Callable[[], bool], timeout_s: float) -> bool:
        deadline = monotonic() + timeout_s
        while not until():
            rest_s = deadline - monotonic()
            if rest_s <= 0:
                return False
            self._hear(rest_s)
        return True

    def _hear(self, timeout_s: float = 0.0) -> None:
        for rank, message in self._ranks.receive(timeout_s):
            report = pb.RankReport.FromString(message)
            match report.WhichOneof("body"):
                case "opened":
                    self._opened[rank] = report.opened
                case "read_ended":
                    self._end_read(rank, report.read_ended)
                case "disconnected":
                    self._end_disconnect(rank, report.disconnected.number)
                case "stamped":
                    if report.stamped.number in self._stamped:
                        self._stamped[report.stamped.number][rank] = report.stamped
                case "shut":
                    self._shut.add(rank)

    def _end_read(self, rank: int, ended: pb.RankReadEnded) -> None:
        parts = self._reads[ended.number]
        parts.pop(rank).end(ended, rank)
        if not parts:
            del self._reads[ended.number]

    def _end_disconnect(self, rank: int, number: int) -> None:
        awaited = self._awaited[number]
        awaited.remove(rank)
        if not awaited:
            del self._awaited[number]
