"""What becomes of each run: placed, retried, left waiting, ended.

Dispatch brings every event to the run's ledger, and here is done what the ledger says and what its
new state asks for. Nothing waits, so a slow client or worker holds up nobody else.

Invariant: a run that is neither with workers nor ended waits here, with a timer that ends the wait.
"""

import logging
from collections.abc import Iterator

from core.clock import Clock
from core.errors import DeadlineError, ErrorCode, UnavailableError
from router.attempts import Attempts
from router.fleet.breakers import Breakers
from router.ledger import Effects, Failure, RequestState
from router.metrics import FleetMetrics
from router.placement.placer import Placer
from router.run import Run
from router.settings import RouterSettings
from router.watchdog import Stage, Watch, Watchdog

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Least time between two looks at one stage."""
MAX_DOUBLINGS = 5
"""Of the wait before a worker that failed a request is tried again."""


class Lifecycle:
    """Every run from admission until its client has left."""

    def __init__(
        self,
        attempts: Attempts,
        placer: Placer,
        settings: RouterSettings,
        metrics: FleetMetrics,
        clock: Clock,
        breakers: Breakers,
    ) -> None:
        self._attempts = attempts
        self._placer = placer
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._breakers = breakers
        self.watchdog = Watchdog(settings.stuck_after_s)
        self._runs: dict[str, Run] = {}
        self.find = self._runs.get
        """The run of a request id, None if there is none."""
        self._waiting: dict[str, Run] = {}
        """Runs that no worker could take."""

    def __iter__(self) -> Iterator[Run]:
        """Those that there are now; they may end meanwhile."""
        return iter(list(self._runs.values()))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._runs)

    def add(self, run: Run) -> None:
        """A run begins; it is not placed before `settle`."""
        assert run.request.request_id not in self._runs
        self._runs[run.request.request_id] = run
        self._metrics.in_flight.set(len(self._runs))
        run.set_timer("deadline", run.request.deadline - self._clock(), self._deadline_passed)

    def remove(self, run: Run) -> None:
        """Its client has left: nothing may go on working for it."""
        self.carry_out(run, run.ledger.stop())
        del self._runs[run.request.request_id]
        self._metrics.in_flight.set(len(self._runs))

    def settle(self, run: Run) -> None:
        """Place a waiting run, again if its workers vanish at once, or let it wait."""
        sibling = self._runs.get(run.request.shares_prompt_with or "")
        while run.ledger.state is RequestState.WAITING:
            now = self._clock()
            try:
                placement = self._attempts.choose(run, sibling, now)
            except UnavailableError as error:
                run.refusal = error.message
                self._wait(run, now)
                return
            self._leave_waiting(run)
            effects = self._attempts.start(run, placement)
            if effects.failure is None:
                first = placement.prefill or placement.worker
                self._watch(run, Watch(Stage.FIRST_TOKEN, first, now))
            self.carry_out(run, effects)

    def settle_waiting(self) -> None:
        """Try again all that no worker could take."""
        for run in list(self._waiting.values()):
            self.settle(run)

    def carry_out(self, run: Run, effects: Effects) -> None:
        """Do what the ledger said after an event, and what its new state asks for."""
        if effects.aborts:
            self._attempts.abort(run, effects.aborts)
        if effects.tokens:
            run.timeline.tokens(len(effects.tokens))
            run.push(effects.tokens)
            if run.watch is not None:
                self._go_on_watching(run, run.watch)
            if run.charges:
                self._breakers.progressed(run.charges, run.timeline.attempts[-1])
        if effects.failure is not None:
            if run.watch is None or effects.failure.stage != run.watch.stage:
                self._end_trial(run, None)
            run.watch = None
            run.timeline.attempt_failed(effects.failure)
            self._breakers.failed(effects.failure, run.timeline.attempts[-1], run.charges)
        if run.ledger.state is RequestState.ENDED:
            self._ended(run)
        elif effects.failure is not None:
            self._retry(run, effects.failure)

    def _watch(self, run: Run, watch: Watch) -> None:
        run.watch = watch
        run.set_timer("stage", self._budget_s(run, watch), self._look)

    def _budget_s(self, run: Run, watch: Watch) -> float:
        predicted_s = run.timeline.attempts[-1].placement.cost_s
        deadline = run.request.deadline
        return self.watchdog.budget_s(watch, predicted_s=predicted_s, deadline=deadline)

    def _go_on_watching(self, run: Run, watch: Watch) -> None:
        """A stage has brought a token: go on to the next one, if there is one."""
        self.watchdog.served(watch)
        self._end_trial(run, True)
        run.watch = None
        attempt = run.timeline.attempts[-1]
        if attempt.placement.prefill is not None and attempt.second_token_at is None:
            assert attempt.first_token_at is not None
            decode = attempt.placement.worker
            self._watch(run, Watch(Stage.TRANSFER, decode, attempt.first_token_at))

    def _look(self, run: Run) -> None:
        """A stage has used its budget up: take it elsewhere if it is stuck, once per stage."""
        watch = run.watch
        if watch is None or run.ledger.state is not RequestState.RUNNING:
            return
        self._end_trial(run, False)
        now = self._clock()
        budget_s = self._budget_s(run, watch)
        verdict = self.watchdog.verdict(watch, budget_s, now)
        others = self._attempts.takers - run.ledger.avoid - {watch.worker}
        if not verdict or not others or watch.stage in run.stuck_in:
            run.set_timer("stage", max(LOOK_S, budget_s / 2), self._look)
            return
        if not self.watchdog.try_elsewhere():
            run.set_timer("stage", LOOK_S, self._look)
            return
        run.on_trial = True
        run.stuck_in.add(watch.stage)
        self._metrics.stuck.labels(watch.stage.value).inc()
        passed_s = now - watch.began_at
        message = (
            f"Worker {watch.worker} brought the request no further in {passed_s:.1f} s "
            f"({watch.stage}): {verdict}."
        )
        failure = Failure(ErrorCode.UNAVAILABLE, message, watch.worker, watch.stage)
        partner = run.timeline.attempts[-1].placement.prefill
        if watch.stage is Stage.TRANSFER and partner is not None and others - {partner}:
            run.ledger.avoid.add(partner)  # nobody knows which of the two has lost the hand-over
        self.carry_out(run, run.ledger.give_up(failure))

    def _end_trial(self, run: Run, right: bool | None) -> None:
        if run.on_trial:
            run.on_trial = False
            self.watchdog.tried(right)

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
        self.settle(run)

    def _wait(self, run: Run, now: float) -> None:
        if run.request.request_id not in self._waiting:
            self._waiting[run.request.request_id] = run
            self._metrics.waiting.set(len(self._waiting))
            run.set_timer("grace", self._settings.no_worker_grace_s, self._grace_passed)
        if now < run.retry_at:
            run.set_timer("retry", run.retry_at - now, self.settle)

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
        self.carry_out(run, run.ledger.stop(error))

    def _deadline_passed(self, run: Run) -> None:
        given_s = run.request.deadline - run.request.received_at
        error = DeadlineError(
            f"The request did not end within its {given_s:.3g} s; it had "
            f"{len(run.ledger.emitted)} of at most {run.request.sampling.max_tokens} tokens."
        )
        self.carry_out(run, run.ledger.stop(error))

    def _ended(self, run: Run) -> None:
        """The ledger has ended; its client may still have tokens to take."""
        if run.timeline.ended_at is not None:
            return
        self._leave_waiting(run)
        run.cancel_timer("deadline")
        run.cancel_timer("stage")
        self._end_trial(run, None)
        run.timeline.ended(run.ledger.end, run.ledger.error)
        if run.ledger.error is None:
            self._breakers.ended(run.timeline.attempts)
        if run.ledger.end is not None:
            self._placer.generated(len(run.ledger.emitted))
        self._metrics.generations.labels(run.timeline.outcome).inc()
        self._metrics.attempts.observe(run.ledger.attempt)
        run.wake()
