"""The engine's public face: requests in, tokens out, one step per call.

Called by a worker's engine loop, or by `engine.llm` in a plain loop; one thread, no locks, no
network. Blocks can leave and enter: a prefill role holds the blocks of a request beyond its end, a
decode role reserves blocks, brings KV in and has the sequence adopted.

With an executor that overlaps, one step is in flight between two calls of `step`: each call first
starts the step after it, then waits for it. A step that was planned too early for a sequence, since
that ended meanwhile, leaves no trace but the time it took.

What a holder may rely on:
- What num_computed tokens fill of a sequence's blocks never changes while held.
- An ended sequence keeps its blocks until `reap`, which the next `step` calls first. So whoever
  wants to hold them has from the return of one `step` to the next.
- A block that a step in flight writes is free for others only when the step is over.
- A preempted sequence loses its block table and is computed again. Blocks that were reported and
  held before stay right; the table may name other blocks of equal content for the same tokens.

Invariant: every block is free, cached or held, and every reference has an owner: a sequence, a
reservation or a hold (`check_integrity`).
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.block_hash import root_hash
from core.clock import Clock, monotonic
from core.errors import DiptychError, InvalidRequestError, OverloadedError
from core.tokens import TokenLogprobs
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.executor import Executor
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.desk import GrammarDesk
from engine.in_flight import StepsInFlight
from engine.intake import Intake
from engine.kv.allocator import BlockAllocator
from engine.limits import engine_limits
from engine.metrics import EngineMetrics
from engine.plan import StepResult
from engine.rates import StepRates
from engine.request import (
    CacheChange,
    EngineRequest,
    EngineStats,
    SequenceOutput,
    StepOutputs,
)
from engine.scheduler import Scheduler
from engine.sequence import SequenceState, SequenceStatus

if TYPE_CHECKING:  # scheduling needs no torch; only who builds an executor does
    from engine.kv.pool import KVPool

WATERMARK_RATIO = 0.01
"""Share of the pool that admission leaves for running sequences to grow into.

Source: the default of vLLM's scheduler (Apache-2.0).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Blocks set aside for KV that comes from elsewhere. Ends with `adopt` or `cancel`."""

    request_id: str
    num_tokens: int
    """Prompt tokens and earlier output: what the KV must cover."""
    block_table: Sequence[int]
    """Blocks of [0, num_tokens), in order. The first num_cached_blocks must not be written."""
    num_cached_tokens: int
    num_cached_blocks: int
    """Leading blocks whose KV is here already."""


class Engine:
    """One model on one executor, serving many sequences at once."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        model_digest: bytes,
        clock: Clock = monotonic,
        metrics: EngineMetrics | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """Put the parts together; without `grammars` there is no structured output."""
        model, pool = executor.model_config, executor.pool
        block_size = pool.layout.block_size
        model_len = model.max_position
        if config.max_model_len is not None:
            model_len = min(model_len, config.max_model_len)
        self._executor = executor
        self._in_flight = StepsInFlight(executor)
        self._grammars = GrammarDesk(grammars, self._in_flight, model.vocab_size)
        self._clock = clock
        self._metrics = metrics
        self._log = logging.getLogger(__name__)
        self._intake = Intake(
            model_len=model_len,
            num_blocks=pool.num_blocks,
            block_size=block_size,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            root_hash=root_hash(model_digest) if config.prefix_caching else None,
        )
        self._blocks = BlockAllocator(pool.num_blocks)
        self._tables = BlockTables(
            self._blocks, block_size=block_size, caching=config.prefix_caching
        )
        watermark = max(1, int(pool.num_blocks * WATERMARK_RATIO))
        self._limits = engine_limits(config, gpu=pool.device_id is not None)
        self._scheduler = Scheduler(config, self._limits, self._tables, watermark, clock)
        self._rates = StepRates()
        self._live: dict[str, SequenceState] = {}
        self._ended: dict[str, SequenceState] = {}
        self._leaving: list[SequenceState] = []
        self._reserved: dict[str, tuple[Reservation, SequenceState]] = {}
        self._holds: Counter[int] = Counter()
        self._stuck = False
        self._last_end = clock()

    @property
    def pool(self) -> "KVPool":
        """The memory that block ids point into."""
        return self._executor.pool

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._executor.model_config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids with which the model itself ends an output."""
        return self._executor.model_config.eos_token_ids

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens that this engine serves."""
        return self._intake.max_len

    @property
    def max_num_seqs(self) -> int:
        """Most sequences in one step."""
        return self._limits.max_num_seqs

    @property
    def has_work(self) -> bool:
        """True if a step would do something: compute, admit, wait, or free what has ended.

        False too while sequences wait but held or reserved blocks leave them no room; it turns true
        again when one of those ends.
        """
        if self._ended or self._in_flight:
            return True
        return bool(self._live) and (not self._stuck or self._grammars.has_news)

    @property
    def waits_for_grammar(self) -> bool:
        """True if `has_work` may turn true by itself, once a grammar is compiled."""
        return len(self._grammars) > 0

    def await_grammar(self, timeout_s: float) -> None:
        """Wait for that, in a caller that has nothing else to do."""
        self._grammars.await_news(timeout_s)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission."""
        return self._scheduler.num_waiting

    def check(self, request: EngineRequest) -> None:
        """See whether a request could be served, without taking it.

        Raises:
            InvalidRequestError: it never can, or its id is in use.
        """
        self._sequence_of(request)

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it can never be served, or its id is in use.
            OverloadedError: the waiting queue is full.
        """
        sequence = self._sequence_of(request)
        self._grammars.ask(sequence)
        try:
            self._scheduler.add(sequence)
        except OverloadedError as error:
            rate = self._rates.prefill_tokens_per_s
            wait_s = self._scheduler.backlog_tokens / rate if rate else 1.0
            raise OverloadedError(error.message, retry_after_s=max(1.0, wait_s)) from None
        self._enter(sequence)
        self._stuck = False

    def abort(self, request_id: str) -> bool:
        """End a request now, without an output, and free its blocks.

        If a step in flight computes it, the blocks are free when that is over, and not before.
        A reservation is not touched: a transport may be writing to it, so only `cancel` ends it.

        Returns:
            False if the request is unknown or has ended.
        """
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        self._grammars.leave(sequence)
        self._scheduler.abort(sequence)
        self._leaving.append(sequence)
        self._free_left()
        return True

    def step(self) -> StepOutputs:
        """Free what ended in the last step, then compute one step.

        If the executor overlaps, the step after it is started before this one is waited for.
        A failing executor fails the sequences of this step only; the error is in their outputs.
        """
        self.reap()
        refused = self._take_grammars() if self._grammars else []
        while self._in_flight.has_room and self._launch():
            pass
        outputs = self._land() if self._in_flight else StepOutputs()
        outputs.outputs[:0] = refused
        return outputs

    def settle(self) -> list[StepOutputs]:
        """Wait for what is in flight without starting a step. Returns what it did, in order.

        For whoever aborts and then needs blocks, or the device, at rest.
        """
        return [self._land() for _ in range(len(self._in_flight))]

    def reap(self) -> None:
        """Free the blocks of sequences that have ended. `step` begins with it.

        Those that a step in flight writes to are free when it is over.
        """
        if self._ended:
            self._leaving += self._ended.values()
            self._ended.clear()
            self._free_left()

    def block_table(self, request_id: str) -> Sequence[int]:
        """Blocks of a live, or ended and not yet reaped, request; a view, so copy what you keep.

        Empty while it waits. Complete blocks are those below num_computed // block_size.
        """
        return self._find(request_id).block_table

    def num_computed(self, request_id: str) -> int:
        """Tokens whose KV is in those blocks. Falls back when the request is preempted."""
        return self._find(request_id).num_computed

    def hold(self, block_ids: Sequence[int]) -> None:
        """Keep blocks of a live, ended or reserved request until `release`."""
        assert all(self._blocks.references(block_id) for block_id in block_ids), (
            "not held by anyone"
        )
        self._blocks.hold(block_ids)
        self._holds.update(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """Undo one `hold`, of the same blocks in table order."""
        assert all(self._holds[block_id] for block_id in block_ids), "released without a hold"
        self._holds.subtract(block_ids)
        for block_id in block_ids:
            if not self._holds[block_id]:
                del self._holds[block_id]
        self._blocks.release(block_ids)
        self._stuck = False

    def reserve(self, request: EngineRequest) -> Reservation | None:
        """Set blocks aside for a request whose KV comes from elsewhere.

        What the prefix cache holds is in the table already. Running sequences keep the watermark.

        Returns:
            None if there is no room now; ask again after a step, or once something was released.

        Raises:
            InvalidRequestError: it can never be served, or its id is in use.
        """
        sequence = self._sequence_of(request)
        self._grammars.ask(sequence)
        if not self._scheduler.reserve(sequence):
            return None
        reservation = Reservation(
            request_id=sequence.request_id,
            num_tokens=len(sequence.token_ids),
            block_table=tuple(sequence.block_table),
            num_cached_tokens=sequence.num_cached_tokens,
            num_cached_blocks=sequence.num_registered,
        )
        self._reserved[sequence.request_id] = (reservation, sequence)
        return reservation

    def cancel(self, reservation: Reservation) -> None:
        """Free a reservation's blocks. No-op once adopted or cancelled.

        NOTE: nothing may still be writing to them; stop the transport first.
        """
        if self._is_open(reservation):
            _, sequence = self._reserved.pop(reservation.request_id)
            self._scheduler.cancel(sequence)
            self._stuck = False

    def adopt(
        self, reservation: Reservation, first_token: int, logprobs: TokenLogprobs | None = None
    ) -> SequenceOutput:
        """Go on with a request whose KV has arrived in full and was verified.

        The complete blocks enter the prefix cache here, not before.

        Args:
            reservation: open, its blocks written.
            first_token: sampled by prefill, at index len(request.output_ids).
            logprobs: of that token, if asked for.

        Returns:
            What that token did, in the form of a step's output; `step` does not report it again.
            With a finish_reason the request is over: it was the last token.
        """
        assert self._is_open(reservation), f"reservation {reservation.request_id} is not open"
        _, sequence = self._reserved.pop(reservation.request_id)
        self._scheduler.adopt(sequence, first_token)
        if sequence.status is SequenceStatus.ENDED:
            self._ended[sequence.request_id] = sequence
        else:
            self._enter(sequence)
        self._stuck = False
        return sequence.report(first_token, logprobs)

    def stats(self) -> EngineStats:
        """The load at this moment. O(waiting + running)."""
        scheduler, blocks = self._scheduler, self._blocks
        return EngineStats(
            waiting=scheduler.num_waiting,
            running=scheduler.num_running,
            backlog_tokens=scheduler.backlog_tokens,
            total_blocks=blocks.num_blocks,
            free_blocks=blocks.num_free,
            cached_blocks=blocks.num_cached,
            held_blocks=blocks.num_held,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            preemptions=scheduler.num_preemptions,
            cached_tokens=self._tables.cached_tokens,
            lookup_tokens=self._tables.lookup_tokens,
        )

    def drain_cache_changes(self) -> CacheChange:
        """Hashes that the prefix cache gained and lost since the last call."""
        return self._blocks.drain_changes()

    def cached_hashes(self) -> list[bytes]:
        """Every hash that the prefix cache can serve: a snapshot. Drain changes with it."""
        return self._blocks.hashes()

    def flush_cache(self) -> int:
        """Forget every cached block that nothing holds. Returns how many."""
        return self._blocks.flush()

    def check_integrity(self) -> None:
        """Assert that every block is in one state and every reference has its owner."""
        self._blocks.check_integrity()
        owners = Counter(self._holds)
        reserved = [sequence for _, sequence in self._reserved.values()]
        ended = (*self._ended.values(), *self._leaving)
        for sequence in (*self._live.values(), *ended, *reserved):
            owners.update(sequence.block_table)
        for block_id in range(self._blocks.num_blocks):
            counted, owned = self._blocks.references(block_id), owners[block_id]
            assert counted == owned, f"block {block_id}: {counted} references, {owned} owners"
        in_flight = Counter(sequence for step in self._in_flight for sequence in step.sequences)
        for sequence in (*self._live.values(), *ended, *reserved):
            counted, expected = sequence.steps_in_flight, in_flight.pop(sequence, 0)
            assert counted == expected, f"{sequence.request_id}: {expected} steps in flight"
        assert not in_flight, "a step in flight computes a sequence that nobody owns"

    def _enter(self, sequence: SequenceState) -> None:
        self._live[sequence.request_id] = sequence
        self._grammars.wait(sequence)

    def _take_grammars(self) -> list[SequenceOutput]:
        """Let sequences go on whose grammar is there, and end those that will never have one."""
        refused = []
        for sequence, error in self._grammars.take():
            self._stuck = False
            if error is not None:
                refused.append(self._scheduler.refuse(sequence, error))
                self._ended[sequence.request_id] = self._live.pop(sequence.request_id)
        return refused

    def _launch(self) -> bool:
        """Plan a step and start it, if there is anything to do."""
        started_at = self._clock()
        ahead = bool(self._in_flight)
        step = self._scheduler.schedule(ahead=ahead)
        if step is None:
            self._stuck = not ahead
            return False
        self._in_flight.submit(step, started_at)
        return True

    def _land(self) -> StepOutputs:
        """Wait for the oldest step in flight and take in what it did."""
        finished = self._in_flight.wait()
        step, outcome = finished.step, finished.outcome
        if isinstance(outcome, StepResult):
            outputs, ended = self._scheduler.update(step, outcome)
        else:
            count = len(step.sequences)
            self._log.error("A step of %d sequences failed.", count, exc_info=outcome)
            outputs, ended = self._scheduler.fail(step, _typed(outcome))
        for sequence in ended:
            self._ended[sequence.request_id] = self._live.pop(sequence.request_id)
        if self._leaving:
            self._free_left()
        # A step that was started while another one ran began when that one ended.
        began_at, self._last_end = max(finished.started_at, self._last_end), self._clock()
        duration_s = self._last_end - began_at
        self._rates.observe(step.num_prefill_tokens, step.num_decode_tokens, duration_s)
        done = StepOutputs(outputs, step.num_prefill_tokens, step.num_decode_tokens, duration_s)
        if self._metrics is not None:
            self._metrics.observe_step(done)
        return done

    def _free_left(self) -> None:
        """Free what ended sequences hold, except where a step in flight still writes."""
        leaving, self._leaving = self._leaving, []
        for sequence in leaving:
            if sequence.steps_in_flight:
                self._leaving.append(sequence)
            else:
                self._tables.release(sequence)
                self._stuck = False

    def _sequence_of(self, request: EngineRequest) -> SequenceState:
        request_id = request.request_id
        if request_id in self._live or request_id in self._ended or request_id in self._reserved:
            raise InvalidRequestError(f"Request id {request_id} is in use; choose another.")
        return self._intake.sequence(request, self._clock())

    def _find(self, request_id: str) -> SequenceState:
        return self._live.get(request_id) or self._ended[request_id]

    def _is_open(self, reservation: Reservation) -> bool:
        entry = self._reserved.get(reservation.request_id)
        return entry is not None and entry[0] is reservation


def _typed(error: Exception) -> DiptychError:
    if isinstance(error, DiptychError):
        return error
    return DiptychError(f"The engine failed to execute a step: {type(error).__name__}: {error}")
