"""The controller's loop: ask the routers, decide for each pool, set its scale; and say so.

Owned by main.py. A turn that fails changes nothing and is tried again at the next; nothing is kept
that a restart would miss but how long fewer replicas have been enough.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from core.clock import Clock
from core.errors import UnavailableError
from diptych.autoscale.policy import PoolScaler, PoolSignals
from diptych.autoscale.scale_api import Scale, Target
from diptych.autoscale.signals import Signals

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where signals come from."""

    async def signals(self) -> Signals | None:
        """None if there are none that are fresh."""


class Scales(Protocol):
    """What sets replicas; called in a thread."""

    def read(self, target: Target) -> Scale:
        """See ScaleApi."""

    def write(self, target: Target, replicas: int, version: str) -> None:
        """See ScaleApi."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A pool that is scaled."""

    target: Target
    scaler: PoolScaler


class Metrics:
    """What an operator sees of the controller."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.replicas = Gauge(
            "diptych_autoscale_replicas",
            "Replicas that a pool is asked to have.",
            ["role"],
            registry=registry,
        )
        self.usage = Gauge(
            "diptych_autoscale_signal_ratio",
            "A signal over its target or limit, as decisions see it.",
            ["role", "signal"],
            registry=registry,
        )
        self.changes = Counter(
            "diptych_autoscale_changes_total",
            "Changes of a pool's scale.",
            ["role", "direction"],
            registry=registry,
        )
        self.failures = Counter(
            "diptych_autoscale_failures_total",
            "Turns that ended without a decision or its change, by what was missing.",
            ["role", "missing"],
            registry=registry,
        )
        self.turned_at = Gauge(
            "diptych_autoscale_last_turn_seconds",
            "Unix time of the last turn that had fresh signals.",
            registry=registry,
        )

    def show(self, role: str, signals: PoolSignals) -> None:
        """Show what a decision sees."""
        for name, ratio in {**signals.shares, **signals.strains}.items():
            if ratio is not None:
                self.usage.labels(role, name.replace(" ", "_").lower()).set(ratio)


class Controller:
    """See the module."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        source: Source,
        scales: Scales,
        metrics: Metrics,
        clock: Clock,
        *,
        dry_run: bool,
    ) -> None:
        """Scale `pools`, by role: prefill, decode or both."""
        self._pools = pools
        self._source = source
        self._scales = scales
        self._metrics = metrics
        self._clock = clock
        self._dry_run = dry_run
        self._said: dict[str, str] = {}
        self.turned_at = clock()
        """End of the last turn, whatever came of it."""

    async def run(self, interval_s: float) -> None:
        """Decide again and again until cancelled."""
        while True:
            await self.turn()
            await asyncio.sleep(interval_s)

    async def turn(self) -> None:
        """Decide once for each pool."""
        signals = await self._source.signals()
        if signals is not None:
            self._metrics.turned_at.set_to_current_time()
        for role, pool in self._pools.items():
            seen: PoolSignals | None = getattr(signals, role) if signals is not None else None
            if seen is None:
                self._metrics.failures.labels(role, "signals").inc()
            else:
                self._metrics.show(role, seen)
            try:
                await self._scale(role, pool, seen)
            except UnavailableError as error:
                self._metrics.failures.labels(role, "scale").inc()
                log.warning("%s is not scaled: %s", role, error)
        self.turned_at = self._clock()

    async def _scale(self, role: str, pool: Pool, signals: PoolSignals | None) -> None:
        scale = await asyncio.to_thread(self._scales.read, pool.target)
        self._metrics.replicas.labels(role).set(scale.replicas)
        decision = pool.scaler.decide(signals, scale.replicas, self._clock())
        if decision.replicas == scale.replicas:
            if self._said.get(role) != decision.reason:
                log.debug("%s stays at %d: %s", role, scale.replicas, decision.reason)
            self._said[role] = decision.reason
            return
        change = f"{role} ({pool.target}): {scale.replicas} -> {decision.replicas} replicas"
        if self._dry_run:
            log.info("would scale %s: %s", change, decision.reason)
            return
        await asyncio.to_thread(self._scales.write, pool.target, decision.replicas, scale.version)
        log.info("scaled %s: %s", change, decision.reason)
        self._metrics.replicas.labels(role).set(decision.replicas)
        direction = "up" if decision.replicas > scale.replicas else "down"
        self._metrics.changes.labels(role, direction).inc()
