"""Runs sequences on the fleet: admission, placement, attempts, failover. The router's Generator.

It is driven by three things, all on one event loop: the API's calls, the workers' messages (it is
the links' listener) and timers. Every change of a request goes through its ledger, and `_carry_out`
does what the ledger says; nothing here waits, so a slow client or worker holds up nobody else.

Invariant: a run is in `_runs` from admission until its client leaves its context; by then each leg
has finished, is lost or was sent an Abort.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from core.clock import Clock
from core.errors import (
    DeadlineError,
    OverloadedError,
    UnavailableError,
)
from router.admission import Admission, AdmissionLimits, Priority, Ticket, check_fits, pushed_out
from router.fleet.breakers import Breakers
from router.fleet.worker import (
    CacheChange,
    LegEnd,
    PromptRun,
    Role,
    TokenRun,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)
from router.generation import Generation, GenerationRequest, ServedModel
from router.ledger import Effects, Failure, RequestLedger, RequestState
from router.metrics import FleetMetrics
from router.placement.decision import Placement, Refusal
from router.placement.placer import Placer
from router.placement.prefix_index import Applied
from router.run import Run
from router.settings import RouterSettings
from router.spans import Spans
from router.timeline import RequestTimeline, TimelineStore
from rpc.v1 import worker_pb2

log = logging.getLogger(__name__)

MAX_DOUBLINGS = 5
"""Of the wait before a worker that failed a request is tried again."""


class Workers(Protocol):
    """What dispatch needs of the fleet."""

    def send(self, worker: str, message: worker_pb2.RouterMessage) -> bool:
        """Queue a message; False if the worker can't be reached."""

    def info(self, worker: str) -> WorkerInfo | None:
        """None while the worker is not attached."""

    @property
    def absent(self) -> Mapping[str, str]:
        """Workers that are not attached, and why."""

    @property
    def shortage(self) -> str:
        """Why there may be none, as a sentence."""

    @property
    def census(self) -> Iterable[tuple[Role, WorkerState]]:
        """Role and state of every known worker."""


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
        self._runs: dict[str, Run] = {}
        self._waiting: dict[str, Run] = {}
        """Runs that no worker could take."""
        self._ready: set[str] = set()
        """Workers that take requests."""
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
        return bool(self._ready) and not self._draining and self._admission.open

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
        run = self._runs.get(request_id)
        if run is None or run.ledger.state is RequestState.ENDED:
            return False
        self._carry_out(run, run.ledger.abort())
        return True

    def abort_all(self) -> int:
        """End every sequence with what it has; see Generator."""
        return sum([self.abort(request_id) for request_id in list(self._runs)])

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
            for run in list(self._runs.values()):
                self._carry_out(run, run.ledger.stop(_shutting_down()))

    # The workers' side.

    def attached(self, worker: str, info: WorkerInfo) -> None:
        """A worker is there; see LinkListener."""
        self._placer.add(worker, info)
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
        self._ready.discard(worker)
        for run in list(self._runs.values()):
            self._carry_out(run, run.ledger.lost(worker, cause))
        # With nobody left to wait for, the queue's requests wait for a worker, but not for long.
        self._start_queued()

    def tokens(self, worker: str, runs: list[TokenRun]) -> None:
        """One engine step's tokens."""
        for request_id, attempt, tokens, cached_tokens in runs:
            run = self._runs.get(request_id)
            if run is None:
                self._metrics.stale_messages.inc()
            else:
                effects = run.ledger.tokens(worker, attempt, tokens, cached_tokens)
                self._carry_out(run, effects)

    def prompt(self, worker: str, run: PromptRun) -> None:
        """What one engine step computed of a prompt."""
        found = self._runs.get(run.request_id)
        if found is None:
            self._metrics.stale_messages.inc()
        else:
            self._carry_out(found, found.ledger.prompt(worker, run.attempt, run.logprobs))

    def finished(self, worker: str, end: LegEnd) -> None:
        """A worker is done with its part."""
        run = self._runs.get(end.request_id)
        if run is None:
            self._metrics.stale_messages.inc()
            return
        run.timeline.leg_ended(worker, end)
        self._carry_out(run, run.ledger.finished(worker, end))

    def load(self, worker: str, load: WorkerLoad) -> None:
        """A load report."""
        self._placer.report(worker, load, self._clock())
        if self._admission.queued:
            self._start_queued()
        takes = load.state is WorkerState.READY
        if takes != (worker in self._ready):
            (self._ready.add if takes else self._ready.discard)(worker)
            if takes:
                for run in list(self._waiting.values()):
                    self._settle(run)

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
        return any(leg.worker == worker for run in self._runs.values() for leg in run.ledger.legs)

    # One run.

    def _begin(self, request: GenerationRequest) -> Run:
        if self._draining:
            raise _shutting_down()
        now = self._clock()
        model = self.model
        check_fits(request, model)
        if request.deadline <= now:
            raise DeadlineError("The request's deadline had passed when it came to be placed.")
        assert request.request_id not in self._runs
        self._queue(request, now)
        ledger = RequestLedger(
            prompt_len=len(request.prompt_ids),
            sampling=request.sampling,
            eos_token_ids=model.eos_token_ids,
            max_model_len=model.max_model_len,
            max_attempts=self._settings.max_attempts,
        )
        run = Run(request, ledger, RequestTimeline(request=request, clock=self._clock))
        self._runs[request.request_id] = run
        self._timelines.add(run.timeline)
        self._empty.clear()
        self._metrics.in_flight.set(len(self._runs))
        run.set_timer("deadline", request.deadline - now, self._deadline_passed)
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
            run = self._runs[victim.request_id]
            self._carry_out(run, run.ledger.stop(pushed_out()))

    def _start_queued(self) -> None:
        """Place requests from the queue for as long as admission lets any out."""
        now = self._clock()
        while (ticket := self._admission.next(self.backlog_s)) is not None:
            run = self._runs[ticket.request_id]
            run.timeline.admitted()
            self._metrics.queue_wait.observe(now - run.request.tokenized_at)
            self._settle(run)
        self._metrics.queued.set(self._admission.queued)

    def _settle(self, run: Run) -> None:
        """Place a waiting run, again if its workers vanish at once, or let it wait."""
        while run.ledger.state is RequestState.WAITING:
            placement = self._choose(run)
            if placement is None:
                return
            self._start(run, placement)

    def _choose(self, run: Run) -> Placement | None:
        now = self._clock()
        try:
            placement = self._placer.place(
                run.prompt,
                run.hashes_for,
                now,
                avoid=run.ledger.avoid | self._apart_from_sibling(run),
                allow_avoided=now >= run.retry_at,
                distrust=self._breakers.distrust(),
                model_digest=run.model_digest if run.ledger.emitted else None,
                absent=[
                    Refusal((worker,), cause) for worker, cause in self._workers.absent.items()
                ],
            )
        except UnavailableError as error:
            run.refusal = error.message
            self._wait(run, now)
            return None
        finally:
            self._metrics.decision.observe(self._clock() - now)
        self._leave_waiting(run)
        return placement

    def _apart_from_sibling(self, run: Run) -> set[str]:
        """Workers that would compute again what one computes for a sequence of the same prompt.

        Both would be as fast, so cost alone does not keep the sequences together. Only for the
        first attempt: after a failure any worker is welcome.
        """
        sibling = self._runs.get(run.request.shares_prompt_with or "")
        chosen = sibling.prompt_worker if sibling is not None and not run.ledger.attempt else None
        if chosen not in self._ready:
            return set()
        roles = {
            worker: info.role for worker in self._ready if (info := self._workers.info(worker))
        }
        return {w for w, role in roles.items() if w != chosen and role == roles.get(chosen)}

    def _start(self, run: Run, placement: Placement) -> None:
        info = self._workers.info(placement.worker)
        peer = self._workers.info(placement.prefill) if placement.prefill is not None else None
        assert info is not None
        worker_ids = {"decode": info.worker_id} | ({"prefill": peer.worker_id} if peer else {})
        messages = run.messages(placement, info, peer, self._clock())
        run.model_digest = info.model_digest
        run.prompt_worker = placement.prefill
        run.ledger.place(messages, mode=placement.mode.value)
        run.timeline.placed(run.ledger.attempt, placement, worker_ids)
        self._breakers.placed(placement)
        self._metrics.routing.labels(placement.mode.value).inc()
        self._metrics.prefix_match.observe(placement.cached_tokens / run.prompt.num_tokens)
        run.wake()
        for leg, message in messages.items():
            if not self._workers.send(leg.worker, message):
                self._carry_out(run, run.ledger.lost(leg.worker, "it takes no messages"))
                return

    def _carry_out(self, run: Run, effects: Effects) -> None:
        """Do what the ledger said after an event, and what its new state asks for."""
        for leg in effects.aborts:
            abort = worker_pb2.Abort(request_id=run.request.request_id, attempt=leg.attempt)
            self._workers.send(leg.worker, worker_pb2.RouterMessage(abort=abort))
        if effects.tokens:
            run.timeline.tokens(len(effects.tokens))
            run.push(effects.tokens)
            if run.charges:
                self._breakers.progressed(run.charges, run.timeline.attempts[-1])
        if effects.failure is not None:
            run.timeline.attempt_failed(effects.failure)
            self._breakers.failed(effects.failure, run.timeline.attempts[-1], run.charges)
        if run.ledger.state is RequestState.ENDED:
            self._ended(run)
        elif effects.failure is not None:
            self._retry(run, effects.failure)

    def _retry(self, run: Run, failure: Failure) -> None:
        log.info(
            "attempt %d failed, trying again: %s",
            run.ledger.attempt,
            failure.message,
            extra={"request_id": run.request.request_id, "trace_id": run.request.trace_id},
        )
        self._metrics.retries.labels(failure.code.value).inc()
        doublings = min(run.ledger.fruitless - 1, MAX_DOUBLINGS)
        backoff_s = self._settings.retry_backoff_s * 2**doublings
        run.retry_at = self._clock() + backoff_s
        self._settle(run)

    def _wait(self, run: Run, now: float) -> None:
        if run.request.request_id not in self._waiting:
            self._waiting[run.request.request_id] = run
            self._metrics.waiting.set(len(self._waiting))
            run.set_timer("grace", self._settings.no_worker_grace_s, self._grace_passed)
        if now < run.retry_at:
            run.set_timer("retry", run.retry_at - now, self._settle)

    def _leave_waiting(self, run: Run) -> None:
        run.cancel_timer("grace")
        run.cancel_timer("retry")
        if self._waiting.pop(run.request.request_id, None) is not None:
            self._metrics.waiting.set(len(self._waiting))

    def _grace_passed(self, run: Run) -> None:
        failure = run.ledger.failure
        before = f" The attempt before failed: {failure.message}" if failure is not None else ""
        grace_s = self._settings.no_worker_grace_s
        error = UnavailableError(f"Waited {grace_s:g} s for a worker. {run.refusal}{before}")
        self._carry_out(run, run.ledger.stop(error))

    def _deadline_passed(self, run: Run) -> None:
        given_s = run.request.deadline - run.request.received_at
        error = DeadlineError(
            f"The request did not end within its {given_s:.1f} s; it had "
            f"{len(run.ledger.emitted)} of at most {run.request.sampling.max_tokens} tokens."
        )
        self._carry_out(run, run.ledger.stop(error))

    def _ended(self, run: Run) -> None:
        """The ledger has ended; its client may still have tokens to take."""
        if run.timeline.ended_at is not None:
            return
        self._leave_waiting(run)
        run.cancel_timer("deadline")
        run.timeline.ended(run.ledger.end, run.ledger.error)
        if run.ledger.error is None:
            self._breakers.ended(run.timeline.attempts)
        if run.ledger.end is not None:
            self._placer.generated(len(run.ledger.emitted))
        self._metrics.generations.labels(run.timeline.outcome).inc()
        self._metrics.attempts.observe(run.ledger.attempt)
        run.wake()

    def _close(self, run: Run) -> None:
        """The client has left: nothing may go on working for it."""
        self._carry_out(run, run.ledger.stop())
        run.timeline.closed()
        self._spans.closed(run.timeline)
        del self._runs[run.request.request_id]
        self._metrics.in_flight.set(len(self._runs))
        self._metrics.account(run.timeline.ledger)
        self._admission.leave(run.request.request_id, run.timeline.running_s)
        self._start_queued()
        if not self._runs:
            self._empty.set()


def _shutting_down() -> UnavailableError:
    return UnavailableError("The router is shutting down. Send the request again.")


def _describe(workers: Workers) -> str:
    shown = "; ".join(f"{worker}: {cause}" for worker, cause in list(workers.absent.items())[:8])
    return f"{shown}." if shown else workers.shortage
