"""Every sequence of one engine, by where it is: reserved, live, ended or leaving.

Owned by `Engine`. A request's id is in use while its sequence is reserved, live or ended; an ended
one keeps its blocks until `reap`, so that they can be held. Invariant: a sequence is in one place
at a time, and its blocks are free for others only when no step in flight writes to them.

    reserved -> live -> ended -> leaving -> gone
    reserved -> ended   its first token was its last one
    reserved -> gone    cancelled
    live -> leaving     aborted
"""

from collections.abc import Iterator
from itertools import chain

from engine.block_tables import BlockTables
from engine.request import Reservation
from engine.sequence import SequenceState


class Sequences:
    """Where each sequence is, and when its blocks are freed."""

    def __init__(self, tables: BlockTables) -> None:
        """`tables` takes the blocks of those that have gone."""
        self._tables = tables
        self._reserved: dict[str, tuple[Reservation, SequenceState]] = {}
        self._live: dict[str, SequenceState] = {}
        self._ended: dict[str, SequenceState] = {}
        self._leaving: list[SequenceState] = []

    def __iter__(self) -> Iterator[SequenceState]:
        """All that may own blocks, each once."""
        reserved = (sequence for _, sequence in self._reserved.values())
        return chain(self._live.values(), self._ended.values(), self._leaving, reserved)

    def __contains__(self, request_id: str) -> bool:
        """True if the id is in use."""
        return request_id in self._live or request_id in self._ended or request_id in self._reserved

    @property
    def num_live(self) -> int:
        """Those that wait or run."""
        return len(self._live)

    @property
    def num_ended(self) -> int:
        """Those that wait for `reap`."""
        return len(self._ended)

    def live(self, request_id: str) -> SequenceState | None:
        """The live sequence of a request; None if there is none."""
        return self._live.get(request_id)

    def with_blocks(self, request_id: str) -> SequenceState:
        """The live or ended sequence of a request.

        Raises:
            KeyError: there is none.
        """
        return self._live.get(request_id) or self._ended[request_id]

    def enter(self, sequence: SequenceState) -> None:
        """A new or adopted sequence is live from now on."""
        self._live[sequence.request_id] = sequence

    def end(self, sequence: SequenceState) -> None:
        """A sequence has come to its end; its blocks stay until `reap`."""
        self._live.pop(sequence.request_id, None)
        self._ended[sequence.request_id] = sequence

    def leave(self, sequence: SequenceState) -> None:
        """A live sequence was aborted: nobody will ask for its blocks."""
        del self._live[sequence.request_id]
        self._leaving.append(sequence)
        self.free_left()

    def reap(self) -> None:
        """Free the blocks of those that have ended."""
        if self._ended:
            self._leaving += self._ended.values()
            self._ended.clear()
            self.free_left()

    def free_left(self) -> None:
        """Free what leaving sequences hold, except where a step in flight still writes."""
        if not self._leaving:
            return
        leaving, self._leaving = self._leaving, []
        for sequence in leaving:
            if sequence.steps_in_flight:
                self._leaving.append(sequence)
            else:
                self._tables.release(sequence)

    def reserve(self, sequence: SequenceState) -> Reservation:
        """A sequence has blocks for KV that comes from elsewhere."""
        reservation = Reservation(
            request_id=sequence.request_id,
            num_tokens=len(sequence.token_ids),
            block_table=tuple(sequence.block_table),
            num_cached_tokens=sequence.num_cached_tokens,
            num_cached_blocks=sequence.num_registered,
        )
        self._reserved[sequence.request_id] = (reservation, sequence)
        return reservation

    def unreserve(self, reservation: Reservation) -> SequenceState | None:
        """End a reservation; returns its sequence, None if it is not open."""
        entry = self._reserved.get(reservation.request_id)
        if entry is None or entry[0] is not reservation:
            return None
        del self._reserved[reservation.request_id]
        return entry[1]
