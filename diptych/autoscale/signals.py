"""From what routers expose to how full each pool is.

Every router sees the whole fleet, so gauges are taken at their maximum over routers; each counts
its own requests only, so counters are added up, over the last `window_s`. Pure: texts and times
come in.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from diptych.autoscale.policy import PoolSignals

MIN_SPAN_S = 5.0
"""Least time between the two scrapes that a rate comes from."""
AVERAGE_S = 30.0
"""Time over which gauges are averaged: one long prompt is no backlog."""
ITL_QUANTILE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a pool is steered to."""

    backlog_s: float
    busy: float
    kv: float
    batch: float
    itl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One router at one moment."""

    at: float
    ready: Mapping[str, int]
    """Role to workers."""
    backlog_s: float
    kv: float
    batch: float
    prompt_tokens: float
    """Counter."""
    gaps: Mapping[float, float]
    """Counter of gaps between tokens, by the upper bound of their bucket, cumulative."""
    hit_ratio: float
    prefill_tokens_per_s: float
    """Mean of the prefill workers; 0 until measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Both pools."""

    prefill: PoolSignals
    decode: PoolSignals


@dataclass(slots=True)
class SignalWindow:
    """Readings of all routers over the last `window_s`."""

    targets: Targets
    window_s: float
    _readings: dict[str, deque[Reading]] = field(default_factory=dict)

    def add(self, readings: Mapping[str, Reading]) -> None:
        """Take in what each router said in this turn, by its address; others are forgotten."""
        for address in self._readings.keys() - readings.keys():
            del self._readings[address]
        for address, reading in readings.items():
            past = self._readings.setdefault(address, deque())
            if past and reading.prompt_tokens < past[-1].prompt_tokens:
                past.clear()  # it has started again
            past.append(reading)
            while len(past) > 2 and past[1].at <= reading.at - self.window_s:
                past.popleft()

    def signals(self, *, complete: bool) -> Signals:
        """How full the pools are.

        Args:
            complete: every router that there is has answered.
        """
        targets, latest = self.targets, [past[-1] for past in self._readings.values()]
        return Signals(
            prefill=PoolSignals(
                ready=max(each.ready["prefill"] for each in latest),
                shares={"busy share": self._busy()},
                strains={"backlog": self._mean(lambda each: each.backlog_s) / targets.backlog_s},
                complete=complete,
            ),
            decode=PoolSignals(
                ready=max(each.ready["decode"] for each in latest),
                shares={
                    "KV occupancy": self._mean(lambda each: each.kv) / targets.kv,
                    "batch occupancy": self._mean(lambda each: each.batch) / targets.batch,
                },
                strains={"ITL": self._itl()},
                complete=complete,
            ),
        )

    def _mean(self, gauge: Callable[[Reading], float]) -> float:
        """Of the last AVERAGE_S, of the router that shows most."""
        means = []
        for past in self._readings.values():
            recent = [gauge(each) for each in past if each.at > past[-1].at - AVERAGE_S]
            means.append(sum(recent) / len(recent))
        return max(means)

    def _busy(self) -> float | None:
        """Prompt tokens per second that no cache spares, over what the ready workers compute."""
        latest = [past[-1] for past in self._readings.values()]
        per_s = max(each.prefill_tokens_per_s for each in latest)
        ready = max(each.ready["prefill"] for each in latest)
        rates = [
            (past[-1].prompt_tokens - past[0].prompt_tokens) / (past[-1].at - past[0].at)
            for past in self._readings.values()
            if past[-1].at - past[0].at >= MIN_SPAN_S
        ]
        if len(rates) < len(self._readings):
            return None
        tokens_per_s = sum(rates) * (1 - min(each.hit_ratio for each in latest))
        if not per_s:
            return 0.0 if not tokens_per_s else None
        return tokens_per_s / (max(1, ready) * per_s) / self.targets.busy

    def _itl(self) -> float | None:
        gaps: dict[float, float] = {}
        for past in self._readings.values():
            for bound, count in past[-1].gaps.items():
                gaps[bound] = gaps.get(bound, 0.0) + count - past[0].gaps.get(bound, 0.0)
        value = quantile(ITL_QUANTILE, gaps)
        return None if value is None else value / self.targets.itl_s


def read_router(metrics: str, at: float) -> Reading:
    """What a router's /metrics say.

    Raises:
        KeyError or ValueError: they are not those of a router.
    """
    values: dict[tuple[str, str], float] = {}
    gaps: dict[float, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name, labels = sample.name.removeprefix("diptych_router_"), sample.labels
            if name == "inter_token_latency_seconds_bucket":
                bound = float(labels["le"])
                gaps[bound] = gaps.get(bound, 0.0) + sample.value
            elif name.startswith("pool_") or name == "prompt_tokens_total":
                values[name, labels.get("role", "")] = sample.value
            elif name == "workers" and labels["state"] == "ready":
                values[name, labels["role"]] = sample.value
    return Reading(
        at=at,
        ready={role: int(values.get(("workers", role), 0)) for role in ("prefill", "decode")},
        backlog_s=values["pool_backlog_seconds", "prefill"],
        kv=values["pool_kv_usage_ratio", "decode"],
        batch=values["pool_batch_usage_ratio", "decode"],
        prompt_tokens=values["prompt_tokens_total", ""],
        gaps=gaps,
        hit_ratio=values["pool_cache_hit_ratio", "prefill"],
        prefill_tokens_per_s=values["pool_prefill_tokens_per_second", "prefill"],
    )


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """As PromQL's histogram_quantile: linear within a bucket; None of an empty histogram.

    Args:
        share: 0 to 1.
        buckets: upper bound to the cumulative count; the last bound is infinite.
    """
    bounds: Sequence[float] = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    rank, below, start = share * total, 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= rank:
            if bound == float("inf"):
                return start
            return start + (bound - start) * (rank - below) / max(1e-12, count - below)
        below, start = count, bound
    return start
