"""What the router remembers of workers that fail, and of pairs that can't hand KV over.

Fed by dispatch, asked by it before each placement, shown by the observer. What counts:

- the end of a worker's link, once, however many requests it had;
- an internal error or a refusal as unavailable, but only once another worker has brought the very
  token that this one could not: a request that fails everywhere speaks against the request. So
  does whatever else a client can bring about (errors of status 4xx, deadlines, going away);
- a failed hand-over, against the pair. Both workers may be well, and others may reach them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from core.clock import Clock
from core.errors import ErrorCode
from router.fleet.breaker import Breaker, BreakerLimits, BreakerState
from router.ledger import Failure
from router.metrics import FleetMetrics
from router.placement.decision import Placement
from router.placement.prices import Distrust

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

    def placed(self, placement: Placement) -> None:
        """A request goes to these workers."""
        now = self._clock()
        for key in _keys(placement):
            if key in self._breakers:
                self._breakers[key].placed(now)

    def lost(self, worker: str, cause: str) -> None:
        """A worker's link has ended; what is known of its pairs was known of that session."""
        now = self._clock()
        for key in [key for key in self._breakers if isinstance(key, tuple) and worker in key]:
            del self._breakers[key]
        self._fail(worker, now, f"it was lost: {cause}")

    def failed(self, failure: Failure, placement: Placement, placed_at: float) -> Charge | None:
        """An attempt failed; returns what is to be charged once it is proven."""
        if failure.code is ErrorCode.KV_TRANSFER and placement.prefill is not None:
            self._fail((placement.prefill, placement.worker), placed_at, failure.message)
        elif failure.code in SUSPECT:
            return Charge(failure.worker, placed_at, failure.message)
        return None

    def proven(self, charge: Charge, placement: Placement) -> None:
        """The workers of another attempt have done what had failed."""
        if charge.worker not in (placement.worker, placement.prefill):
            self._fail(charge.worker, charge.began_at, charge.cause)

    def succeeded(self, placement: Placement, placed_at: float) -> None:
        """An attempt ended well, or its client had enough of what came."""
        for key in _keys(placement):
            breaker = self._breakers.get(key)
            if breaker is not None:
                breaker.succeeded(placed_at)
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
            pairs={key: why for key, why in shut.items() if isinstance(key, tuple)},
        )

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
