"""What the router remembers of workers that fail, and of pairs that can't hand KV over.

Fed by dispatch, asked by it before each placement, shown by the observer. What counts:

- the end of a worker's link, once, however many requests it had;
- an internal error or a refusal as unavailable, but only once another worker has brought the very
  token that this one could not: a request that fails everywhere speaks against the request. So
  does whatever else a client can bring about (errors of status 4xx, deadlines, going away);
- a failed hand-over, against the pair. Both workers may be well, and others may reach them;
- a decode worker's word that no test block comes from a prefill worker, for as long as it says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from core.clock import Clock
from core.errors import ErrorCode
from router.fleet.breaker import Breaker, BreakerLimits, BreakerState
from router.fleet.worker import LinkFailure, WorkerInfo, WorkerLoad
from router.ledger import Failure
from router.metrics import FleetMetrics
from router.placement.decision import Placement
from router.placement.prices import Distrust
from router.timeline import Attempt

Pair = tuple[str, str]
"""Addresses of a prefill and of a decode worker."""
SUSPECT = frozenset({ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE})
"""Failures that may be the worker's or the request's fault."""


@dataclass(frozen=True, slots=True)
class Charge:
    """A failure that counts once another worker has done what failed."""

    worker: str
    began_at: float
    cause: str


class Breakers:
    """Breakers of all workers and pairs; one that is as good as new is forgotten."""

    def __init__(self, limits: BreakerLimits, metrics: FleetMetrics, clock: Clock) -> None:
        """`limits` are those of workers; a pair opens at its first failure.

        Without the pair a prompt goes over another one, or is computed where it is generated, while
        one more hand-over that hangs may cost ten seconds.
        """
        pair_limits = BreakerLimits(
            failures=1,
            window_s=limits.window_s,
            open_s=limits.open_s,
            open_max_s=limits.open_max_s,
        )
        self._limits = {"worker": limits, "pair": pair_limits}
        self._metrics = metrics
        self._clock = clock
        self._breakers: dict[str | Pair, Breaker] = {}
        self._lifetimes: dict[tuple[str, int], str] = {}
        """Id and epoch to address, of attached workers."""
        self._links: dict[str, Mapping[str, LinkFailure]] = {}
        """Decode worker to what it says of its links, where it says something."""

    def attached(self, worker: str, info: WorkerInfo) -> None:
        """A worker is there."""
        self._forget(worker)
        self._lifetimes[info.worker_id, info.epoch] = worker

    def reported(self, worker: str, load: WorkerLoad) -> None:
        """What a worker says of its links now."""
        if load.link_failures:
            self._links[worker] = load.link_failures
        else:
            self._links.pop(worker, None)

    def placed(self, placement: Placement) -> None:
        """A request goes to these workers."""
        now = self._clock()
        for key in _keys(placement):
            if key in self._breakers:
                self._breakers[key].placed(now)

    def lost(self, worker: str, cause: str) -> None:
        """A worker's link has ended; what is known of its pairs was known of that session."""
        now = self._clock()
        self._forget(worker)
        for key in [key for key in self._breakers if isinstance(key, tuple) and worker in key]:
            del self._breakers[key]
        self._fail(worker, now, f"it was lost: {cause}")

    def failed(self, failure: Failure, attempt: Attempt, charges: list[Charge]) -> None:
        """An attempt failed; what is not proven yet is added to the charges of its request."""
        prefill, worker = attempt.placement.prefill, attempt.placement.worker
        if failure.code is ErrorCode.KV_TRANSFER and prefill is not None:
            self._fail((prefill, worker), attempt.placed_at, failure.message)
        elif failure.code in SUSPECT:
            charges.append(Charge(failure.worker, attempt.placed_at, failure.message))

    def progressed(self, charges: list[Charge], attempt: Attempt) -> None:
        """An attempt brought the token that those before it could not: their charges are proven."""
        for charge in charges:
            if charge.worker not in (attempt.placement.worker, attempt.placement.prefill):
                self._fail(charge.worker, charge.began_at, charge.cause)
        charges.clear()

    def ended(self, attempts: Sequence[Attempt]) -> None:
        """A request is over: well for the last attempt, unless that failed or brought nothing."""
        if not self._breakers or not attempts:
            return
        last = attempts[-1]
        if last.num_tokens and last.failed_at is None:
            for key in _keys(last.placement):
                if key in self._breakers:
                    self._breakers[key].succeeded(last.placed_at)
            self._tidy()

    def distrust(self) -> Distrust:
        """Whom not to place on now, and why."""
        now = self._clock()
        shut = {
            key: f"fails of late ({breaker.cause}); next try in {breaker.retry_in_s(now):.1f} s"
            for key, breaker in self._breakers.items()
            if not breaker.admits(now)
        }
        return Distrust(
            workers={key: why for key, why in shut.items() if isinstance(key, str)},
            pairs={key: why for key, why in shut.items() if isinstance(key, tuple)}
            | dict(self._dark_links()),
        )

    def _dark_links(self) -> Iterator[tuple[Pair, str]]:
        for decode, failures in self._links.items():
            for worker_id, failure in failures.items():
                prefill = self._lifetimes.get((worker_id, failure.epoch))
                if prefill is not None:
                    yield (prefill, decode), f"KV does not move between them: {failure.cause}"

    def _forget(self, worker: str) -> None:
        self._links.pop(worker, None)
        for lifetime in [key for key, address in self._lifetimes.items() if address == worker]:
            del self._lifetimes[lifetime]

    def describe(self, key: str | Pair) -> Mapping[str, object]:
        """For JSON."""
        breaker = self._breakers.get(key)
        if breaker is None:
            return {"state": BreakerState.CLOSED, "failures": 0}
        now = self._clock()
        return {
            "state": breaker.state(now),
            "failures": breaker.failures,
            "cause": breaker.cause,
            "retry_in_s": round(breaker.retry_in_s(now), 3),
        }

    def _fail(self, key: str | Pair, began_at: float, cause: str) -> None:
        scope = _scope(key)
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = Breaker(self._limits[scope])
        if breaker.failed(began_at, self._clock(), cause):
            self._metrics.breaker_openings.labels(scope).inc()
        self._tidy()

    def _tidy(self) -> None:
        now = self._clock()
        for key in [key for key, each in self._breakers.items() if each.forgettable(now)]:
            del self._breakers[key]
        for scope in self._limits:
            shut = [
                each.state(now) is not BreakerState.CLOSED
                for key, each in self._breakers.items()
                if _scope(key) == scope
            ]
            self._metrics.breakers.labels(scope).set(sum(shut))


def _scope(key: str | Pair) -> str:
    return "worker" if isinstance(key, str) else "pair"


def _keys(placement: Placement) -> Iterator[str | Pair]:
    yield placement.worker
    if placement.prefill is not None:
        yield placement.prefill
        yield placement.prefill, placement.worker
