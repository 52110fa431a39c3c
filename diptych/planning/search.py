"""The smallest fleet that meets an SLO under a load, and how much more it would carry. Pure.

Invariant of the search: TTFT depends on the prefill pool alone and one more replica never makes a
prompt later, so the least prefill pool is found by halving. What decode makes of it is tried, from
the cheapest fleet that might do upwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import ConfigError
from diptych.planning.block_cache import hits_of_one_cache
from diptych.planning.fleet import (
    Outcome,
    Prefilled,
    Slo,
    decode,
    judge,
    prefill,
)
from diptych.planning.rates import WorkerRates
from diptych.planning.trace import BLOCK_SIZE, TracedRequest, faster

PLACEMENT_SHARE = 0.95
"""Part of the hits of one cache as large as all that the router's placement gets.

Source: benchmarks/placement_simulator.py, conversation trace, 8 to 512 workers.
"""
MAX_CARRIED = 64.0
"""Times the load up to which the search for what a fleet carries goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """What prefix caches spare."""

    hit_ratio: float | None = None
    """Share of prompt tokens; None: what the trace's own prefixes make of `tokens_per_replica`."""
    tokens_per_replica: int | None = None
    """That a prefill replica keeps, in all tiers; None: all that it ever saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Replicas of both pools."""

    prefill: int
    decode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a replica of each pool costs, in GPUs or whatever is counted."""

    prefill: float = 1.0
    decode: float = 1.0

    def of(self, fleet: Fleet) -> float:
        """Of all replicas."""
        return fleet.prefill * self.prefill + fleet.decode * self.decode


class Bench:
    """Tries fleets on one load; remembers what the prefill pool made of it."""

    def __init__(
        self, requests: Sequence[TracedRequest], caches: Caches, rates: WorkerRates, slo: Slo
    ) -> None:
        """Try fleets on `requests`, in the order of their arrival."""
        self.requests, self.rates, self.slo = requests, rates, slo
        self.allowed = slo.allowed_misses(len(requests))
        self._caches = caches
        self._prefilled: dict[int, Prefilled] = {}
        self._spared: dict[int | None, list[int]] = {}

    def prefilled(self, replicas: int) -> Prefilled:
        """All prompts on a prefill pool."""
        if replicas not in self._prefilled:
            self._prefilled[replicas] = prefill(
                self.requests, self.cached(replicas), replicas, self.rates, self.slo
            )
        return self._prefilled[replicas]

    def cached(self, replicas: int) -> list[int]:
        """Tokens of each prompt that a pool's caches spare."""
        if self._caches.hit_ratio is not None:
            ratio = self._caches.hit_ratio
            return [int(min(ratio * r.prompt_tokens, r.prompt_tokens - 1)) for r in self.requests]
        each = self._caches.tokens_per_replica
        blocks = None if each is None else replicas * each // BLOCK_SIZE
        if blocks not in self._spared:
            hits = hits_of_one_cache(self.requests, blocks)
            self._spared[blocks] = [int(PLACEMENT_SHARE * hit) for hit in hits]
        return self._spared[blocks]

    def meets(self, fleet: Fleet) -> bool:
        """True if as many requests as must meet the SLO."""
        prefilled = self.prefilled(fleet.prefill)
        if prefilled.late > self.allowed:
            return False
        jobs = decode(prefilled, fleet.decode, self.rates, self.slo, max_misses=self.allowed)
        return jobs is not None

    def outcome(self, fleet: Fleet) -> Outcome:
        """What becomes of the load."""
        prefilled = self.prefilled(fleet.prefill)
        jobs = decode(prefilled, fleet.decode, self.rates, self.slo, max_misses=None)
        assert jobs is not None
        pools = (fleet.prefill, fleet.decode)
        return judge(jobs, prefilled.busy_s, self.slo, self.rates, replicas=pools)


def smallest_fleet(bench: Bench, cost: Cost, *, max_replicas: int) -> Fleet:
    """The cheapest fleet that meets the SLO.

    Raises:
        ConfigError: none of up to `max_replicas` in a pool does; the message says what is in the
            way.
    """
    _refuse_hopeless(bench)
    least = _least(lambda count: bench.prefilled(count).late <= bench.allowed, max_replicas)
    if least is None:
        raise ConfigError(_too_slow(bench, max_replicas, "prefill"))
    decodes = _least(lambda count: bench.meets(Fleet(prefill=least, decode=count)), max_replicas)
    best = None if decodes is None else Fleet(prefill=least, decode=decodes)
    # A prompt that waits less leaves its decode more evenly spread: one more prefill replica may
    # spare a decode replica, or be what it takes.
    for count in range(least + 1, max_replicas + 1):
        if best is None:
            room = max_replicas
        else:
            spare = cost.of(best) - count * cost.prefill
            room = min(max_replicas, int(-(-spare // cost.decode)) - 1)
        if room < 1:
            break
        if not bench.meets(Fleet(prefill=count, decode=room)):
            if best is None and bench.prefilled(count).late == 0:
                break
            continue
        while room > 1 and bench.meets(Fleet(prefill=count, decode=room - 1)):
            room -= 1
        best = Fleet(prefill=count, decode=room)
    if best is None:
        raise ConfigError(_too_slow(bench, max_replicas, "decode"))
    return best


def carried(
    requests: Sequence[TracedRequest],
    fleet: Fleet,
    make_bench: Callable[[Sequence[TracedRequest]], Bench],
) -> tuple[float, Outcome]:
    """How many times the load a fleet carries, to 1 %, and what becomes of it at that limit.

    Args:
        requests: the load, which the fleet carries once.
        fleet: to be tried.
        make_bench: makes a bench for another load.
    """

    def meets(factor: float) -> bool:
        return make_bench(faster(requests, factor)).meets(fleet)

    low, high = 1.0, 2.0
    while high < MAX_CARRIED and meets(high):
        low, high = high, 2 * high
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low, make_bench(faster(requests, high)).outcome(fleet)


def _least(fits: Callable[[int], bool], limit: int) -> int | None:
    """The least count that fits, of what fits ever better with more; None up to `limit`."""
    high = 1
    while not fits(high):
        if high >= limit:
            return None
        high = min(limit, 2 * high)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _refuse_hopeless(bench: Bench) -> None:
    """Raises ConfigError if requests that are alone on a replica miss the SLO already."""
    rates, slo, requests = bench.rates, bench.slo, bench.requests
    cached = bench.cached(1 << 20)
    ttft = [
        rates.prefill_s(each.prompt_tokens - spared, spared)
        for each, spared in zip(requests, cached, strict=True)
    ]
    tpot = [
        rates.decode_step_s(1, each.prompt_tokens + each.output_tokens)
        for each in requests
        if each.output_tokens > 1
    ]
    for what, times, limit_s in (("TTFT", ttft, slo.ttft_s), ("TPOT", tpot, slo.tpot_s)):
        missed = sum(seconds > limit_s for seconds in times)
        if missed > bench.allowed:
            raise ConfigError(
                f"No number of replicas meets the SLO: even alone on a replica, "
                f"{missed / len(requests):.1%} of the requests miss the {what} of {limit_s:g} s, "
                f"and {1 - slo.share:.1%} may. Raise the {what}, lower the share, or use faster "
                "replicas (more tensor parallelism)."
            )


def _too_slow(bench: Bench, limit: int, pool: str) -> str:
    load = f"{len(bench.requests)} requests in {bench.requests[-1].arrives_at:.0f} s"
    return (
        f"No fleet with up to {limit} {pool} replicas meets the SLO under this load ({load}). "
        "Raise max_replicas, loosen the SLO, or use faster replicas."
    )
