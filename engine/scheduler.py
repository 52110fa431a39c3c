"""The engine's brain: which tokens of which sequences the next step computes, and in which blocks.

Owns the waiting queue, the running set and every block that a sequence holds. Called by `Engine`
alone: schedule() -> execute -> update() or fail(). States: waiting -> running -> ended, running ->
preempted -> running, reserved -> running.

A step may be planned ahead, while the step before it is in flight: where a token of that step is
needed, the plan says PENDING. What such a step computes for a sequence that has ended meanwhile is
dropped.

Invariants: sequences are ordered by age (first admission), and only an older one may preempt a
younger one. So the oldest always moves on, unless blocks held outside the running set stand in its
way; those end by themselves (a lease expires, a reservation is adopted or cancelled). A sequence is
never preempted while a step in flight computes it.
"""

from bisect import insort
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from core.clock import Clock
from core.errors import DiptychError
from core.finish import FinishReason
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.draft import ScheduledStep, StepDraft
from engine.limits import EngineLimits
from engine.plan import StepResult
from engine.policy import policy_named
from engine.request import SequenceOutput
from engine.sequence import SequenceState, SequenceStatus, age_of
from engine.waiting import WaitingQueue

MAX_DEFERRED = 16
"""Candidates passed over in one step because their prefix is being computed or copied."""
_NOT_STUCK = -1


class StepEffect(NamedTuple):
    """What a step did, and to which sequences it was the last one."""

    outputs: list[SequenceOutput]
    ended: list[SequenceState]
    """They still have their blocks."""


class Scheduler:
    """Continuous batching with chunked prefill, and preemption by recompute."""

    def __init__(
        self,
        config: EngineConfig,
        limits: EngineLimits,
        tables: BlockTables,
        watermark: int,
        clock: Clock,
    ) -> None:
        """Args: watermark is the number of blocks that admission leaves to running sequences."""
        self._tables = tables
        self._watermark = watermark
        self._max_num_seqs = limits.max_num_seqs
        self._max_step_tokens = limits.max_step_tokens
        self._max_chunk_tokens = limits.max_chunk_tokens
        self._waiting = WaitingQueue(
            policy_named(config.policy),
            max_waiting=config.max_waiting,
            tables=tables,
            clock=clock,
        )
        self._running: list[SequenceState] = []
        self._num_reserved = 0
        self._next_age = 0
        self._blocked: SequenceState | None = None
        self._yields_seat = False
        self._stuck_at = _NOT_STUCK
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks yet, or no longer."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks and move on with each step."""
        return len(self._running)

    @property
    def stuck(self) -> bool:
        """True if there was nothing to schedule, and no sequence or block has come free since."""
        return self._stuck_at == self._tables.num_releases

    @property
    def backlog_tokens(self) -> int:
        """Tokens to compute before every accepted sequence decodes; cached ones not counted."""
        return self._waiting.backlog_tokens + sum(
            sequence.num_to_compute
            for sequence in self._running
            if sequence.num_to_compute > 1 or not sequence.output_ids
        )

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence.

        Raises:
            OverloadedError: the waiting queue is full.
        """
        self._waiting.add(sequence)
        self._stuck_at = _NOT_STUCK

    def schedule(self, *, ahead: bool = False) -> ScheduledStep | None:
        """Choose the next step: decodes first, then prompt chunks, then new sequences.

        Allocates blocks and may preempt.

        Args:
            ahead: a step is in flight.

        Returns:
            None when nothing can be computed now. If planned ahead, also when the step in flight
            has to be waited for first: a token of it shapes the next one beyond being its input, or
            blocks run out. Nothing has changed then.
        """
        step = self._next_step(ahead)
        stuck = step is None and not ahead and not self._tables.awaits_load
        self._stuck_at = self._tables.num_releases if stuck else _NOT_STUCK
        return step

    def update(self, step: ScheduledStep, result: StepResult) -> StepEffect:
        """Take what the executor sampled."""
        outputs: list[SequenceOutput] = []
        moved: list[SequenceState] = []
        ended: list[SequenceState] = []
        for index, (sequence, chunk, token_id, logprobs) in enumerate(
            zip(step.sequences, step.plan.chunks, result.token_ids, result.logprobs, strict=True)
        ):
            sequence.steps_in_flight -= 1
            if sequence.status is SequenceStatus.ENDED:
                continue  # while the step was in flight
            moved.append(sequence)
            sequence.num_computed = chunk.start + len(chunk.token_ids)
            scores = result.scores.get(index) if chunk.score is not None else None
            if scores is not None:
                sequence.next_scored = scores.end
            if token_id is not None:
                sequence.num_pending -= 1
                error = sequence.unusable_token
                if error is not None:
                    ended.append(sequence)
                    outputs.append(self._end_failed(sequence, error))
                    continue
                if sequence.append(token_id) is not None:
                    sequence.status = SequenceStatus.ENDED
                    ended.append(sequence)
            outputs.append(sequence.report(token_id, logprobs, scores=scores))
        self._tables.register(moved)
        if ended:
            self._drop_ended()
        return StepEffect(outputs, ended)

    def fail(self, step: ScheduledStep, error: DiptychError) -> StepEffect:
        """End the sequences of a step that could not be executed; the others go on."""
        ended = []
        for sequence in step.sequences:
            sequence.steps_in_flight -= 1
            if sequence.status is not SequenceStatus.ENDED:
                ended.append(sequence)
        outputs = [self._end_failed(sequence, error) for sequence in ended]
        self._drop_ended()
        return StepEffect(outputs, ended)

    def refuse(self, sequence: SequenceState, error: DiptychError) -> SequenceOutput:
        """End a waiting or running sequence with a cause. It still has its blocks."""
        self.abort(sequence)
        return self._end_failed(sequence, error)

    def abort(self, sequence: SequenceState) -> None:
        """End a waiting or running sequence now. It still has its blocks."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if self._blocked is sequence:
            self._blocked = None
        sequence.finish_reason = FinishReason.ABORTED
        sequence.status = SequenceStatus.ENDED
        self._stuck_at = _NOT_STUCK

    def reserve(self, sequence: SequenceState) -> bool:
        """Give a sequence blocks for all its tokens, so that their KV can be brought in.

        Returns:
            False if there is no room now, sequences that wait for it come first, or blocks are on
            their way back from the tier below.
        """
        if self._waiting.num_preempted or self._blocked is not None or self._num_seats == 0:
            return False
        if self._yields_seat and self._num_seats <= self._waiting.num_admissible:
            return False
        matched = self._tables.match(sequence, whole=True)
        if not self._fits(sequence, matched):
            return False
        if self._tables.fetch(sequence, matched, whole=True, busy=bool(self._running)):
            return False
        self._tables.take(sequence, matched)
        self._tables.grow(sequence, sequence.num_to_compute)
        sequence.status = SequenceStatus.RESERVED
        self._num_reserved += 1
        # The caller asks between steps, before admission gets a turn; so it can't have every seat.
        self._yields_seat = True
        return True

    def cancel(self, sequence: SequenceState) -> None:
        """End a reservation; nothing writes to its blocks any more."""
        self._num_reserved -= 1
        self._stuck_at = _NOT_STUCK
        sequence.status = SequenceStatus.ENDED
        self._tables.release(sequence)

    def adopt(self, sequence: SequenceState, token_id: int) -> None:
        """Run a reserved sequence whose KV is all there and whose next token is known.

        It may end at once; it still has its blocks then.
        """
        self._num_reserved -= 1
        self._stuck_at = _NOT_STUCK
        sequence.num_computed = sequence.num_scheduled = len(sequence.token_ids)
        self._tables.register((sequence,))
        if sequence.append(token_id) is None:
            self._join(sequence)
        else:
            sequence.status = SequenceStatus.ENDED

    def _next_step(self, ahead: bool) -> ScheduledStep | None:
        draft = StepDraft(self._max_step_tokens)
        decodes: list[SequenceState] = []
        prefills: list[SequenceState] = []
        for sequence in self._running:
            if sequence.waits_for_grammar:
                continue
            if not sequence.num_pending:
                (prefills if sequence.num_unscheduled > 1 else decodes).append(sequence)
            elif sequence.ends_when_known:
                continue
            elif sequence.needs_history:
                return None
            else:
                decodes.append(sequence)
        for sequence in chain(decodes, prefills):
            if draft.budget <= 0:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # an older one preempted it in this very step
            wanted = 1 if sequence.num_pending else self._chunk_size(sequence, draft)
            if sequence.num_scheduled + wanted > sequence.num_slots:
                if ahead and self._tables.missing(sequence, wanted) > self._spare_blocks(draft):
                    return None
                wanted = self._make_room(sequence, wanted, draft)
            draft.take(sequence, wanted)
        self._admit(draft)
        return draft.plan(self._tables) if draft.tokens else None

    @property
    def _num_seats(self) -> int:
        return self._max_num_seqs - len(self._running) - self._num_reserved

    def _chunk_size(self, sequence: SequenceState, draft: StepDraft) -> int:
        return min(sequence.num_unscheduled, draft.budget, self._max_chunk_tokens)

    def _make_room(self, sequence: SequenceState, wanted: int, draft: StepDraft) -> int:
        """Claim blocks for up to `wanted` more tokens, preempting younger sequences if need be.

        Returns how many tokens have room; fewer than wanted only for the youngest.
        """
        missing = self._tables.missing(sequence, wanted)
        while missing > self._spare_blocks(draft) and self._running[-1] is not sequence:
            self._preempt(self._running[-1], draft)
        granted = min(missing, self._spare_blocks(draft))
        draft.num_blocks += granted
        return min(wanted, self._tables.room(sequence, granted))

    def _spare_blocks(self, draft: StepDraft) -> int:
        return self._tables.num_available - draft.num_blocks

    def _preempt(self, victim: SequenceState, draft: StepDraft) -> None:
        # The blocks go to the prefix cache, where the recompute finds what is not evicted by then.
        self._running.pop()
        count = draft.drop(victim)
        draft.num_blocks -= self._tables.missing(victim, count)
        self._tables.release(victim)
        self._waiting.put_back(victim)
        self.num_preemptions += 1

    def _admit(self, draft: StepDraft) -> None:
        self._blocked = None
        if self._num_seats == 0 or not self._waiting:
            return
        deferred = 0
        for sequence in self._waiting.next_ones(self._num_seats + MAX_DEFERRED):
            if draft.budget <= 0 or self._num_seats == 0:
                return
            matched = self._tables.match(sequence)
            computed_soon = self._tables.will_compute(self._running, sequence, len(matched))
            if not computed_soon and not self._fits(sequence, matched):
                self._blocked = sequence
                return
            if computed_soon or self._tables.fetch(sequence, matched, busy=bool(self._running)):
                deferred += 1
                if deferred > MAX_DEFERRED:
                    return
                continue
            self._waiting.remove(sequence)
            self._yields_seat = False
            self._tables.take(sequence, matched)
            self._join(sequence)
            wanted = self._chunk_size(sequence, draft)
            draft.take(sequence, self._make_room(sequence, wanted, draft))

    def _fits(self, sequence: SequenceState, matched: Sequence[int]) -> bool:
        """True if all its tokens fit beside what running prompts still need and the watermark."""
        spare = self._tables.spare_after(sequence, matched, self._running)
        return spare >= (self._watermark if self._running or self._num_reserved else 0)

    def _join(self, sequence: SequenceState) -> None:
        if sequence.age < 0:
            sequence.age = self._next_age
            self._next_age += 1
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=age_of)

    def _end_failed(self, sequence: SequenceState, error: DiptychError) -> SequenceOutput:
        sequence.finish_reason = FinishReason.FAILED
        sequence.status = SequenceStatus.ENDED
        return sequence.report(error=error)

    def _drop_ended(self) -> None:
        self._running = [
            sequence for sequence in self._running if sequence.status is SequenceStatus.RUNNING
        ]
