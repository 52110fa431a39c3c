"""The engine's public face: requests in, tokens out, one step per call.

Called by a worker's engine loop, or by `engine.llm` in a plain loop; one thread, no locks, no
network. Blocks can leave and enter: a prefill role holds the blocks of a request beyond its end, a
decode role reserves blocks, brings KV in and has the sequence adopted.

With an executor that overlaps, one step is in flight between two calls of `step`: each call first
starts the step after it, then waits for it. A step that was planned too early for a sequence, since
that ended meanwhile, leaves no trace but the time it took.

It joins its parts and decides nothing: what to compute is up to `scheduler.py`, the way of a step
is in `step_cycle.py`, which sequences there are in `sequences.py`, what holders may rely on in
`holds.py`.

Invariant: every block is free, cached or held, and every reference has an owner: a sequence, a
reservation, a hold or a load from the tier below (`check_integrity`).
"""

from collections.abc import Sequence
from time import sleep
from typing import TYPE_CHECKING

from core.block_hash import root_hash
from core.clock import Clock, monotonic
from core.errors import InvalidRequestError, OverloadedError
from core.tokens import TokenLogprobs
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.executor import Executor
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.desk import GrammarDesk
from engine.holds import Holds
from engine.in_flight import StepsInFlight
from engine.intake import Intake
from engine.integrity import check_ownership
from engine.kv.tier_copies import build_tiers
from engine.limits import engine_limits, watermark_blocks
from engine.metrics import EngineMetrics
from engine.rates import StepRates
from engine.request import (
    CacheChange,
    EngineRequest,
    EngineStats,
    HostTierStats,
    Reservation,
    SequenceOutput,
    StepOutputs,
)
from engine.scheduler import Scheduler
from engine.sequence import SequenceState, SequenceStatus
from engine.sequences import Sequences
from engine.step_cycle import StepCycle

if TYPE_CHECKING:  # scheduling needs no torch; only who builds an executor does
    from engine.kv.pool import KVPool

_LOAD_POLL_S = 0.0005
"""Sleep between two looks at blocks that come back while there is nothing else to do."""


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
        self._intake = Intake(
            model_len=model_len,
            num_blocks=pool.num_blocks,
            block_size=block_size,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            root_hash=root_hash(model_digest) if config.prefix_caching else None,
        )
        self._limits = engine_limits(config, gpu=pool.device_id is not None)
        self._rates = StepRates()
        self._blocks, self._copies = build_tiers(
            pool.host_memory,
            pool.num_blocks,
            block_size=block_size,
            step_tokens=self._limits.max_step_tokens,
            rates=self._rates,
            clock=clock,
        )
        self._tables = BlockTables(
            self._blocks, block_size=block_size, caching=config.prefix_caching, copies=self._copies
        )
        self._scheduler = Scheduler(
            config, self._limits, self._tables, watermark_blocks(pool.num_blocks), clock
        )
        self._sequences = Sequences(self._tables)
        self._cycle = StepCycle(
            self._scheduler,
            self._in_flight,
            self._sequences,
            rates=self._rates,
            metrics=metrics,
            clock=clock,
        )
        self._holds = Holds(self._blocks)

    @property
    def pool(self) -> "KVPool":
        """The memory that block ids point into."""
        return self._executor.pool

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._executor.model_config.vocab_size

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

        False too while sequences wait but held or reserved blocks leave them no room, or a load
        that takes too long; it turns true again when one of those ends (of a load, `tend` tells).
        """
        if self._sequences.num_ended or self._in_flight or self._tables.awaits_load:
            return True
        if not self._sequences.num_live:
            return False
        return not self._scheduler.stuck or self._grammars.has_news

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

    def abort(self, request_id: str) -> bool:
        """End a request now, without an output, and free its blocks.

        If a step in flight computes it, the blocks are free when that is over, and not before.
        A reservation is not touched: a transport may be writing to it, so only `cancel` ends it.

        Returns:
            False if the request is unknown or has ended.
        """
        sequence = self._sequences.live(request_id)
        if sequence is None:
            return False
        self._grammars.leave(sequence)
        self._scheduler.abort(sequence)
        self._sequences.leave(sequence)
        return True

    def step(self) -> StepOutputs:
        """Free what ended in the last step, then compute one step.

        If the executor overlaps, the step after it is started before this one is waited for.
        A failing executor fails the sequences of this step only; the error is in their outputs.
        """
        self._sequences.reap()
        refused = self._take_grammars() if self._grammars else []
        self.tend()
        while self._cycle.launch():
            pass
        if self._in_flight:
            outputs = self._cycle.land()
        else:
            outputs = StepOutputs()
            if self._tables.awaits_load and not refused:
                sleep(_LOAD_POLL_S)
        outputs.outputs[:0] = refused
        return outputs

    def tend(self) -> None:
        """Take in block copies that have ended and start those that are due. Never waits.

        `step` does it too; call it when there is nothing to compute, which is the best time.
        """
        if self._copies is not None:
            self._copies.tend()

    def settle(self) -> list[StepOutputs]:
        """Wait for what is in flight without starting a step. Returns what it did, in order.

        For whoever aborts and then needs blocks, or the device, at rest.
        """
        return [self._cycle.land() for _ in range(len(self._in_flight))]

    def reap(self) -> None:
        """Free the blocks of sequences that have ended. `step` begins with it.

        Those that a step in flight writes to are free when it is over.
        """
        self._sequences.reap()

    def block_table(self, request_id: str) -> Sequence[int]:
        """Blocks of a live, or ended and not yet reaped, request; a view, so copy what you keep.

        Empty while it waits. Complete blocks are those below num_computed // block_size.
        """
        return self._sequences.with_blocks(request_id).block_table

    def num_computed(self, request_id: str) -> int:
        """Tokens whose KV is in those blocks. Falls back when the request is preempted."""
        return self._sequences.with_blocks(request_id).num_computed

    def hold(self, block_ids: Sequence[int]) -> None:
        """Keep blocks of a live, ended or reserved request until `release`."""
        self._holds.hold(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """Undo one `hold`, of the same blocks in table order."""
        self._holds.release(block_ids)

    def reserve(self, request: EngineRequest) -> Reservation | None:
        """Set blocks aside for a request whose KV comes from elsewhere.

        What the prefix cache holds is in the table already. Running sequences keep the watermark.

        Returns:
            None if there is no room now, or blocks come back from host memory; ask again after a
            step, or once something was released.

        Raises:
            InvalidRequestError: it can never be served, or its id is in use.
        """
        sequence = self._sequence_of(request)
        self._grammars.ask(sequence)
        if not self._scheduler.reserve(sequence):
            return None
        return self._sequences.reserve(sequence)

    def cancel(self, reservation: Reservation) -> None:
        """Free a reservation's blocks. No-op once adopted or cancelled.

        NOTE: nothing may still be writing to them; stop the transport first.
        """
        sequence = self._sequences.unreserve(reservation)
        if sequence is not None:
            self._scheduler.cancel(sequence)

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
        sequence = self._sequences.unreserve(reservation)
        assert sequence is not None, f"reservation {reservation.request_id} is not open"
        self._scheduler.adopt(sequence, first_token)
        if sequence.status is SequenceStatus.ENDED:
            self._sequences.end(sequence)
        else:
            self._enter(sequence)
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
            host=HostTierStats() if self._copies is None else self._copies.stats(),
        )

    def drain_cache_changes(self) -> CacheChange:
        """Hashes that the prefix cache gained and lost since the last call."""
        return self._blocks.drain_changes()

    def cached_hashes(self) -> list[bytes]:
        """Every hash that the prefix cache can serve: a snapshot. Drain changes with it."""
        return self._blocks.hashes()

    def host_hashes(self) -> list[bytes]:
        """Every hash that the tier in host memory can give back, as above."""
        return self._blocks.host_hashes()

    def flush_cache(self) -> int:
        """Forget every cached block that nothing holds, in every tier. Returns how many."""
        if self._copies is not None:
            self._copies.flush()
        return self._blocks.flush()

    def check_integrity(self) -> None:
        """Assert that every block is in one state and every reference has its owner."""
        loading = self._copies.held_blocks() if self._copies is not None else ()
        held = (*self._holds, *loading)
        check_ownership(self._blocks, self._sequences, held, self._in_flight)

    def _enter(self, sequence: SequenceState) -> None:
        self._sequences.enter(sequence)
        self._grammars.wait(sequence)

    def _take_grammars(self) -> list[SequenceOutput]:
        """Let sequences go on whose grammar is there, and end those that will never have one."""
        refused = []
        for sequence, error in self._grammars.take():
            if error is not None:
                refused.append(self._scheduler.refuse(sequence, error))
                self._sequences.end(sequence)
        return refused

    def _sequence_of(self, request: EngineRequest) -> SequenceState:
        request_id = request.request_id
        if request_id in self._sequences:
            raise InvalidRequestError(f"Request id {request_id} is in use; choose another.")
        return self._intake.sequence(request, self._clock())
