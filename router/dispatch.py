"""Runs sequences on the fleet. The router's Generator, and the listener of its links.

Everything that happens comes in here, on one event loop: the API's calls and the workers' messages.
Each goes to the ledger of its run, and what the ledger makes of it on to the lifecycle:

    the API    ──▶ dispatch ──▶ admission               is it its turn?
    a worker   ──▶ dispatch ──▶ run.ledger, lifecycle   what becomes of it?
                                    └──▶ attempts       where does it go next?

Invariant: a run is in the lifecycle from admission until its client leaves its context; by then
each leg has finished, is lost or was sent an Abort.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.clock import Clock
from core.errors import DeadlineError, OverloadedError, UnavailableError
from router.admission import Admission, AdmissionLimits, Priority, Ticket, check_fits, pushed_out
from router.attempts import Attempts, Workers
from router.fleet.breakers import Breakers
from router.fleet.worker import (
    CacheChange,
    LegEnd,
    PromptRun,
    TokenRun,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)
from router.generation import Generation, GenerationRequest, ServedModel
from router.ledger import RequestLedger, RequestState
from router.lifecycle import Lifecycle
from router.metrics import FleetMetrics
from router.placement.placer import Placer
from router.placement.prefix_index import Applied
from router.run import Run
from router.settings import RouterSettings
from router.spans import Spans
from router.timeline import RequestTimeline, TimelineStore


class Dispatcher:
    """See the module. Implements router.generation.Generator and fleet.link.LinkListener."""

    def __init__(
        self,
        workers: Workers,
        placer: Placer,
        settings: RouterSettings,
        metrics: FleetMetrics,
        clock: Clock,
        spans: Spans,
        breakers: Breakers,
    ) -> None:
        self._workers = workers
        self._placer = placer
        self._settings = settings
        self._metrics = metrics
        metrics.backlog.set_function(lambda: self.backlog_s)
        metrics.watch_workers(lambda: workers.census)
        self._clock = clock
        self._spans = spans
        self._breakers = breakers
        self._attempts = Attempts(workers, placer, metrics, clock, breakers)
        self._runs = Lifecycle(self._attempts, placer, settings, metrics, clock, breakers)
        self._model: ServedModel | None = None
        self._timelines = TimelineStore(settings.timelines)
        self._admission = Admission(
            AdmissionLimits(
                max_running=settings.max_in_flight,
                max_queued=settings.max_queued,
                max_backlog_s=settings.max_backlog_s,
            )
        )
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    # The API's side.

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """Place and run one sequence; see Generator."""
        run = self._begin(request)
        try:
            self._start_queued()
            run.timeline.queued = run.timeline.admitted_at is None
            await run.started()
            yield run
        finally:
            self._close(run)

    @property
    def model(self) -> ServedModel:
        """What the workers serve, as long as one has ever said so."""
        if self._model is None:
            raise UnavailableError(f"No worker has answered yet. {_describe(self._workers)}")
        return self._model

    @property
    def ready(self) -> bool:
        """True if a request would be admitted now."""
        return bool(self._attempts.takers) and not self._draining and self._admission.open

    @property
    def backlog_s(self) -> float:
        """Seconds of prompts that the least busy worker has to compute."""
        return self._placer.least_backlog_s(self._clock())

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until a prompt that came now, of a caller with no other, would begin."""
        return self._admission.predicted_wait_s(Priority.NORMAL, "", self.backlog_s)

    def timeline(self, request_id: str) -> dict[str, object] | None:
        """Stages and decisions of a recent request."""
        timeline = self._timelines.get(request_id)
        return None if timeline is None else timeline.as_dict()

    def explain(self, request_id: str) -> dict[str, object] | None:
        """Every candidate of each decision about a recent request."""
        timeline = self._timelines.get(request_id)
        return None if timeline is None else timeline.explanation()

    def abort(self, request_id: str) -> bool:
        """End a sequence with what it has; see Generator."""
        run = self._runs.find(request_id)
        if run is None or run.ledger.state is RequestState.ENDED:
            return False
        self._runs.carry_out(run, run.ledger.abort())
        return True

    def abort_all(self) -> int:
        """End every sequence with what it has; see Generator."""
        return sum([self.abort(run.request.request_id) for run in self._runs])

    @property
    def breakers(self) -> Breakers:
        """Whom it trusts."""
        return self._breakers

    def recent(self, count: int) -> list[RequestTimeline]:
        """Timelines of the latest requests, newest first."""
        return self._timelines.latest(count)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and wait for what runs; end with an error what is left."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            for run in self._runs:
                self._runs.carry_out(run, run.ledger.stop(_shutting_down()))

    # The workers' side.

    def attached(self, worker: str, info: WorkerInfo) -> None:
        """A worker is there; see LinkListener."""
        self._placer.add(worker, info)
        self._breakers.attached(worker, info)
        known = self._model
        self._model = ServedModel(
            name=self._settings.served_model_name or info.model,
            max_model_len=max(info.max_model_len, known.max_model_len if known else 0),
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
        )

    def lost(self, worker: str, cause: str) -> None:
        """A worker is gone: each of its requests goes on elsewhere."""
        self._placer.drop(worker)
        self._breakers.lost(worker, cause)
        self._runs.watchdog.lost(worker)
        self._attempts.takers.discard(worker)
        for run in self._runs:
            self._runs.carry_out(run, run.ledger.lost(worker, cause))
        # With nobody left to wait for, the queue's requests wait for a worker, but not for long.
        self._start_queued()

    def tokens(self, worker: str, runs: list[TokenRun]) -> None:
        """One engine step's tokens."""
        find, carry_out = self._runs.find, self._runs.carry_out
        self._runs.watchdog.worked(worker, self._clock())
        for request_id, attempt, tokens, cached_tokens in runs:
            run = find(request_id)
            if run is None:
                self._metrics.stale_messages.inc()
            else:
                carry_out(run, run.ledger.tokens(worker, attempt, tokens, cached_tokens))

    def prompt(self, worker: str, run: PromptRun) -> None:
        """What one engine step computed of a prompt."""
        self._runs.watchdog.worked(worker, self._clock())
        found = self._runs.find(run.request_id)
        if found is None:
            self._metrics.stale_messages.inc()
        else:
            self._runs.carry_out(found, found.ledger.prompt(worker, run.attempt, run.logprobs))

    def finished(self, worker: str, end: LegEnd) -> None:
        """A worker is done with its part."""
        self._runs.watchdog.worked(worker, self._clock())
        run = self._runs.find(end.request_id)
        if run is None:
            self._metrics.stale_messages.inc()
            return
        run.timeline.leg_ended(worker, end)
        self._runs.carry_out(run, run.ledger.finished(worker, end))

    def load(self, worker: str, load: WorkerLoad) -> None:
        """A load report."""
        now = self._clock()
        self._placer.report(worker, load, now)
        self._breakers.reported(worker, load)
        self._runs.watchdog.reported(worker, load, now)
        if self._admission.queued:
            self._start_queued()
        takers, takes = self._attempts.takers, load.state is WorkerState.READY
        if takes and worker not in takers:
            takers.add(worker)
            self._runs.settle_waiting()
        elif not takes:
            takers.discard(worker)

    def cache(self, worker: str, change: CacheChange) -> bool:
        """A cache event; False if a snapshot is needed."""
        applied = self._placer.apply(worker, change)
        self._metrics.cache_events.labels(applied.name.lower()).inc()
        self._metrics.indexed_blocks.set(self._placer.indexed_blocks)
        if applied is Applied.NEEDS_RESYNC:
            self._metrics.resyncs.inc()
        return applied is not Applied.NEEDS_RESYNC

    def works(self, worker: str) -> bool:
        """True while a request has a leg there."""
        return any(leg.worker == worker for run in self._runs for leg in run.ledger.legs)

    # From admission to the client's leaving.

    def _begin(self, request: GenerationRequest) -> Run:
        if self._draining:
            raise _shutting_down()
        now = self._clock()
        model = self.model
        check_fits(request, model)
        if request.deadline <= now:
            raise DeadlineError("The request's deadline had passed when it came to be placed.")
        self._queue(request, now)
        ledger = RequestLedger(
            prompt_len=len(request.prompt_ids),
            sampling=request.sampling,
            eos_token_ids=model.eos_token_ids,
            max_model_len=model.max_model_len,
            max_attempts=self._settings.max_attempts,
        )
        run = Run(request, ledger, RequestTimeline(request=request, clock=self._clock))
        self._runs.add(run)
        self._timelines.add(run.timeline)
        self._empty.clear()
        return run

    def _queue(self, request: GenerationRequest, now: float) -> None:
        """Let admission judge a new request; who has to leave the full queue for it, ends."""
        ticket = Ticket(
            request_id=request.request_id,
            key=request.key,
            priority=Priority(request.priority),
            tokens=len(request.prompt_ids) + request.sampling.max_tokens,
            deadline=request.deadline,
        )
        try:
            victim = self._admission.offer(ticket, now, self.backlog_s)
        except OverloadedError:
            self._metrics.shed.labels("refused").inc()
            raise
        if victim is not None:
            self._metrics.shed.labels("pushed_out").inc()
            run = self._runs.find(victim.request_id)
            assert run is not None
            self._runs.carry_out(run, run.ledger.stop(pushed_out()))

    def _start_queued(self) -> None:
        """Place requests from the queue for as long as admission lets any out."""
        now = self._clock()
        while (ticket := self._admission.next(self.backlog_s)) is not None:
            run = self._runs.find(ticket.request_id)
            assert run is not None
            run.timeline.admitted()
            self._metrics.queue_wait.observe(now - run.request.tokenized_at)
            self._runs.settle(run)
        self._metrics.queued.set(self._admission.queued)

    def _close(self, run: Run) -> None:
        """The client has left."""
        self._runs.remove(run)
        run.timeline.closed()
        self._spans.closed(run.timeline)
        self._metrics.account(run.timeline.ledger)
        self._admission.leave(run.request.request_id, run.timeline.running_s)
        self._start_queued()
        if not len(self._runs):
            self._empty.set()


def _shutting_down() -> UnavailableError:
    return UnavailableError("The router is shutting down. Send the request again.")


def _describe(workers: Workers) -> str:
    shown = "; ".join(f"{worker}: {cause}" for worker, cause in list(workers.absent.items())[:8])
    return f"{shown}." if shown else workers.shortage
