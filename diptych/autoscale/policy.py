"""How many replicas a pool should have, from how full it is. Pure: time is an argument.

Target tracking with two kinds of signals. A *share* is proportional to 1 / replicas, such as the KV
that is held, so it says how many are wanted, up or down. A *strain*, such as backlog seconds or ITL
over its SLO, says only that there are too few: it is next to nothing until a pool is full.

Up at once, down slowly: a pool shrinks to the most that was wanted during all of the past
`down_after_s`, by few at a time, and not to what was too few for the same load not long ago: bursts
strain a small pool that is large enough on average. Invariant: nothing is decided from data that is
old, and nothing shrinks on data that is not complete.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

TOLERANCE = 0.1
"""A share this far above its target is let pass. Source: the default of Kubernetes' HPA."""
CALM = 0.8
"""Part of their targets and limits that signals must be below for a pool to shrink, and after it.

Source: benchmarks/autoscaling.py: without it, a pool turns three times as often over a day.
"""
MOST_STRAIN = 1.5
"""A strain asks for at most so many times the replicas: what it measures grows without bound."""
SAME_LOAD = 0.8
"""Part of a load that counts as the same load. Source: own judgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSignals:
    """A pool at one moment."""

    ready: int
    """Replicas that take requests."""
    shares: Mapping[str, float | None] = field(default_factory=dict)
    """Name to value over target; None: not known yet."""
    strains: Mapping[str, float | None] = field(default_factory=dict)
    """Name to value over limit; None: nothing to measure."""
    complete: bool = True
    """False if some source was missing, so that there may be more load than seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Bounds and speeds of one pool."""

    min_replicas: int
    max_replicas: int
    up_pause_s: float = 30.0
    """Time that replicas which just became ready have before strain asks for more."""
    down_after_s: float = 300.0
    """Time over which no more may have been wanted."""
    down_pause_s: float = 60.0
    """Least time between two steps down."""
    down_part: float = 0.1
    """Largest part of a pool that one step takes away; one replica always may go."""
    memory_s: float = 3600.0
    """Time for which what was too few is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _TooFew:
    """Replicas that did not do for a load, in replicas' worth of it."""

    replicas: int
    load: float
    at: float


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one decision came from."""

    at: float
    wanted: int
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and why in words."""

    replicas: int
    reason: str


class PoolScaler:
    """Decides for one pool; remembers what was wanted before."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._seen: deque[_Seen] = deque()
        self._unsettled_at = -math.inf
        """Last time that replicas were starting."""
        self._down_at = -math.inf
        self._too_few: _TooFew | None = None

    def decide(self, signals: PoolSignals | None, replicas: int, now: float) -> Decision:
        """Replicas that the pool should have.

        Args:
            signals: None if they are missing or too old.
            replicas: that it is asked to have now.
            now: seconds, of a clock that never goes back.
        """
        pace = self._pace
        if replicas == 0:
            return Decision(replicas=0, reason="scaled to 0 by hand: left alone")
        if signals is None:
            self._remember(_Seen(now, replicas, math.inf))
            return Decision(replicas=replicas, reason="no fresh signals: nothing is changed")
        if signals.ready < replicas:
            self._unsettled_at = now
        wanted, why = self._want(signals, replicas, now)
        wanted = min(pace.max_replicas, max(pace.min_replicas, wanted))
        at_least = wanted if signals.complete else max(wanted, replicas)
        self._remember(_Seen(now, at_least, _load(signals)))
        if wanted > replicas:
            most = max(2 * replicas, replicas + 2)
            self._unsettled_at = now
            if signals.ready == replicas:
                self._too_few = _TooFew(replicas=replicas, load=_load(signals), at=now)
            return Decision(replicas=min(wanted, most), reason=why)
        if replicas > pace.max_replicas:
            return Decision(replicas=pace.max_replicas, reason="more than max_replicas")
        return self._shrink(replicas, now, why)

    def _remember(self, seen: _Seen) -> None:
        """What nobody could see counts as wanted: it may have been."""
        self._seen.append(seen)
        while self._seen[0].at < seen.at - self._pace.down_after_s:
            self._seen.popleft()

    def _want(self, signals: PoolSignals, replicas: int, now: float) -> tuple[int, str]:
        ready = signals.ready
        if ready == 0:
            return replicas, "no replica is ready"
        wants = [(1, "next to nothing to do")]
        for name, ratio in signals.shares.items():
            if ratio is None:
                wants.append((replicas, f"{name} is not known yet"))
            elif 1 < ratio <= 1 + TOLERANCE:
                wants.append((ready, f"{name} is {ratio:.0%} of its target"))
            else:
                # Rounded first: 0.7 / 0.7 is a little more than 1 in binary, now and then.
                wants.append(
                    (math.ceil(round(ready * ratio, 6)), f"{name} is {ratio:.0%} of its target")
                )
        settled = now - self._unsettled_at >= self._pace.up_pause_s
        for name, ratio in signals.strains.items():
            if ratio is None or ratio <= CALM:
                continue
            if ratio <= 1:
                count = ready
            elif not settled:
                count = replicas
            else:
                count = math.ceil(round(ready * min(ratio, MOST_STRAIN), 6))
            wants.append((count, f"{name} is {ratio:.0%} of its limit"))
        return max(wants, key=lambda want: want[0])

    def _shrink(self, replicas: int, now: float, why: str) -> Decision:
        pace = self._pace
        load = max(seen.load for seen in self._seen)
        # With room to spare: a pool that shrinks to what just does would grow again at once.
        calm = math.ceil(min(replicas, load / CALM))
        target = max(calm, *(seen.wanted for seen in self._seen))
        past, since = self._too_few, self._seen[0].at
        remembered = past is not None and now - past.at < pace.memory_s
        if past is not None and remembered and load > SAME_LOAD * past.load:
            least = min(replicas, past.replicas + 1)
            if least > target:
                target, why = least, f"{past.replicas} replicas were too few for this load"
        if target >= replicas:
            return Decision(replicas=replicas, reason=why)
        # The history is as old as this process at most: it, too, has to have seen the whole time.
        if now - since < 0.9 * pace.down_after_s or now - self._down_at < pace.down_pause_s:
            return Decision(replicas=replicas, reason=f"{why}; waiting before it shrinks")
        self._down_at = now
        step = max(1, int(pace.down_part * replicas))
        return Decision(replicas=max(target, replicas - step), reason=why)


def _load(signals: PoolSignals) -> float:
    """Replicas that the pool would need if its fullest share were at its target."""
    known = [ratio for ratio in signals.shares.values() if ratio is not None]
    return signals.ready * max(known, default=math.inf)
