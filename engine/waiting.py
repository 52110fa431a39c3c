"""Who waits for blocks and a place in the steps, and in which order they are asked.

Owned by `Scheduler`. Invariant: a sequence is here while its status is WAITING or PREEMPTED; those
that were preempted come first, oldest first, and then the others as the policy has it.
"""

from bisect import insort
from itertools import chain, islice

from core.clock import Clock
from core.errors import OverloadedError
from engine.block_tables import BlockTables
from engine.policy import Policy
from engine.sequence import SequenceState, SequenceStatus, age_of


class WaitingQueue:
    """Sequences that hold no blocks yet, or no longer."""

    def __init__(
        self, policy: Policy, *, max_waiting: int, tables: BlockTables, clock: Clock
    ) -> None:
        """Args: `max_waiting` bounds those that were never admitted."""
        self._policy = policy
        self._max_waiting = max_waiting
        self._tables = tables
        self._clock = clock
        self._waiting: dict[str, SequenceState] = {}
        self._preempted: list[SequenceState] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def num_preempted(self) -> int:
        """Those that had blocks."""
        return len(self._preempted)

    @property
    def num_admissible(self) -> int:
        """Those that were never admitted and wait for nothing but room."""
        return sum(not sequence.waits_for_grammar for sequence in self._waiting.values())

    @property
    def backlog_tokens(self) -> int:
        """Tokens that they have to compute; cached ones not counted."""
        return sum(
            sequence.num_to_compute - sequence.expected_cached
            for sequence in chain(self._waiting.values(), self._preempted)
        )

    def add(self, sequence: SequenceState) -> None:
        """Take in a new sequence.

        Raises:
            OverloadedError: the queue is full.
        """
        if len(self._waiting) >= self._max_waiting:
            raise OverloadedError(
                f"{len(self._waiting)} requests wait already and max_waiting is "
                f"{self._max_waiting}; try again later or on another worker."
            )
        sequence.expected_cached = self._tables.cached_prefix(sequence)
        self._waiting[sequence.request_id] = sequence

    def put_back(self, sequence: SequenceState) -> None:
        """Take in a sequence that was preempted; its blocks were released."""
        sequence.expected_cached = self._tables.cached_prefix(sequence)
        sequence.status = SequenceStatus.PREEMPTED
        insort(self._preempted, sequence, key=age_of)

    def remove(self, sequence: SequenceState) -> None:
        """A sequence waits no longer: it was admitted or has ended."""
        if sequence.status is SequenceStatus.PREEMPTED:
            self._preempted.remove(sequence)
        else:
            del self._waiting[sequence.request_id]

    def next_ones(self, most: int) -> list[SequenceState]:
        """The first of those that could be admitted, in order."""
        queued = self._policy(self._waiting.values(), self._tables.cached_prefix, self._clock())
        ready = (s for s in chain(self._preempted, queued) if not s.waits_for_grammar)
        return list(islice(ready, most))
