"""What operators promise of each answer, and how many answers kept it.

Judged per sequence by the router, on the times at which it passed tokens on: what a client sees but
for the network. Goodput is the rate of sequences that met every target.
"""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from telemetry.metrics import start_at_zero

TARGETS = ("ttft", "tpot", "itl", "all")
OUTCOMES = ("met", "missed")
GAPS_WITHIN = 0.99
"""Share of a sequence's gaps that must be within the target for ITL: its 99th percentile is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloTargets:
    """Seconds that each may take."""

    ttft_s: float = 1.0
    """From reading the request to its first token."""
    tpot_s: float = 0.015
    """Mean time per output token after the first."""
    itl_s: float = 0.025
    """Gap between two arrivals of tokens, 99 of 100."""


@dataclass(slots=True)
class Pace:
    """When the tokens of one sequence arrived. Times on one monotonic clock, in seconds."""

    started_at: float
    first_at: float | None = None
    last_at: float = 0.0
    num_tokens: int = 0
    gaps: int = 0
    slow_gaps: int = 0

    @property
    def ttft_s(self) -> float | None:
        """None before the first token."""
        return None if self.first_at is None else self.first_at - self.started_at

    @property
    def tpot_s(self) -> float | None:
        """None before the second token."""
        if self.first_at is None or self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)


class SloMetrics:
    """One per router process."""

    def __init__(self, registry: CollectorRegistry, targets: SloTargets) -> None:
        self.targets = targets
        self._sequences = Counter(
            "diptych_router_slo_sequences_total",
            "Sequences that met or missed a target; `all` is every target together, and is missed "
            "too by one that ended with an error that is not its client's.",
            ["target", "outcome"],
            registry=registry,
        )
        start_at_zero(self._sequences, TARGETS, OUTCOMES)
        seconds = Gauge(
            "diptych_router_slo_target_seconds",
            "Target for each sequence, as set.",
            ["target"],
            registry=registry,
        )
        for name, target_s in zip(TARGETS, _seconds(targets), strict=False):
            seconds.labels(name).set(target_s)

    def ended(self, pace: Pace) -> None:
        """A sequence ended well; one without tokens is not judged, what it lacks is met."""
        ttft_s, tpot_s = pace.ttft_s, pace.tpot_s
        if ttft_s is None:
            return
        kept = {"ttft": ttft_s <= self.targets.ttft_s}
        if tpot_s is not None:
            kept["tpot"] = tpot_s <= self.targets.tpot_s
        if pace.gaps:
            kept["itl"] = pace.slow_gaps <= (1 - GAPS_WITHIN) * pace.gaps
        for target, met in kept.items():
            self._count(target, met)
        self._count("all", all(kept.values()))

    def failed(self) -> None:
        """A sequence ended with an error for which its client is not to blame."""
        self._count("all", False)

    def _count(self, target: str, met: bool) -> None:
        self._sequences.labels(target, OUTCOMES[0] if met else OUTCOMES[1]).inc()


def _seconds(targets: SloTargets) -> tuple[float, float, float]:
    return targets.ttft_s, targets.tpot_s, targets.itl_s
