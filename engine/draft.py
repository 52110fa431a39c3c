"""A step while it is put together, and what comes of it.

Filled by `Scheduler` alone, in one call. Invariant: what a sequence is to compute is in the draft
only, and the blocks for it are counted and not allocated, until `plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.block_tables import BlockTables
from engine.plan import PENDING, Chunk, StepPlan
from engine.sequence import SequenceState

_PENDING = (PENDING,)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan and, aligned with its chunks, the sequences that it moves on."""

    plan: StepPlan
    sequences: Sequence[SequenceState]
    num_prefill_tokens: int
    num_decode_tokens: int


class StepDraft:
    """Tokens of each sequence in the step."""

    __slots__ = ("budget", "num_blocks", "tokens")

    def __init__(self, budget: int) -> None:
        """`budget` is the number of tokens that the step may have."""
        self.budget = budget
        self.num_blocks = 0
        """Blocks that the step needs and that are not allocated yet."""
        self.tokens: dict[SequenceState, int] = {}

    def take(self, sequence: SequenceState, count: int) -> None:
        """Compute the next `count` tokens of a sequence."""
        if count:
            self.tokens[sequence] = count
            self.budget -= count

    def drop(self, sequence: SequenceState) -> int:
        """Leave a sequence out; returns how many tokens it had."""
        count = self.tokens.pop(sequence, 0)
        self.budget += count
        return count

    def plan(self, tables: BlockTables) -> ScheduledStep:
        """Allocate the blocks and move the sequences on."""
        chunks = []
        num_decode_tokens = 0
        for sequence, count in self.tokens.items():
            start = sequence.num_scheduled
            end = start + count
            if end > sequence.num_slots:
                tables.grow(sequence, count)
            pending = sequence.num_pending
            token_ids = _PENDING if pending else sequence.token_ids[start:end]
            sample = None
            if end == len(sequence.token_ids) + pending:
                sample = sequence.sample_spec()
                sequence.num_pending = pending + 1
                if count == 1 and (pending or sequence.output_ids):
                    num_decode_tokens += 1
            sequence.num_scheduled = end
            sequence.steps_in_flight += 1
            chunk = Chunk(sequence.request_id, token_ids, start, sequence.block_table, sample)
            chunk.score = sequence.score_spec(start, end)
            chunks.append(chunk)
        num_tokens = sum(self.tokens.values())
        return ScheduledStep(
            StepPlan(chunks),
            tuple(self.tokens),
            num_tokens - num_decode_tokens,
            num_decode_tokens,
        )
