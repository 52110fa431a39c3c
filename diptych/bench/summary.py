"""Figures of a run: throughput, latencies, goodput, failures by their cause. Pure.

A request that failed is in no latency and no throughput, and is not good. Definitions are those of
the router's own metrics (`router.api.slo`), seen from the client.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from diptych.bench.streaming import Outcome
from router.api.slo import GAPS_WITHIN, SloTargets

PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How values of one kind are spread; seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None if there are no values."""
        if not values:
            return None
        p50, p90, p99 = (percentile(values, percent) for percent in PERCENTS)
        return cls(mean=math.fsum(values) / len(values), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run in numbers; seconds, and rates per second."""

    requests: int
    failed: int
    causes: Mapping[str, int]
    """How many failed of each cause."""
    duration_s: float
    """From the first request's turn to the last one's end."""
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompts' tokens; None if the endpoint does not say."""
    output_tokens: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    goodput: float
    """Requests per second that met the SLO."""
    good_share: float
    """Of all requests."""
    met: Mapping[str, float]
    """Share of all requests that met each target."""
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    end_to_end: Spread | None
    late: Spread | None
    """Of sending, for which the client is to blame."""


def ttft_s(outcome: Outcome) -> float:
    """Time to the first token."""
    return outcome.times[0]


def tpot_s(outcome: Outcome) -> float | None:
    """Mean time per output token after the first; None of a single token."""
    if outcome.output_tokens < 2:
        return None
    return (outcome.times[-1] - outcome.times[0]) / (outcome.output_tokens - 1)


def gaps_s(outcome: Outcome) -> list[float]:
    """Times between tokens' arrivals."""
    return [later - sooner for sooner, later in pairwise(outcome.times)]


def kept(outcome: Outcome, slo: SloTargets) -> dict[str, bool]:
    """Which targets a request met; what it lacks, such as a second token, is met."""
    if outcome.cause:
        return {"ttft": False, "tpot": False, "itl": False}
    mean, gaps = tpot_s(outcome), gaps_s(outcome)
    slow = sum(gap > slo.itl_s for gap in gaps)
    return {
        "ttft": ttft_s(outcome) <= slo.ttft_s,
        "tpot": mean is None or mean <= slo.tpot_s,
        # In whole numbers, as one gap in a hundred is exactly what is allowed.
        "itl": 100 * slow <= round(100 * (1 - GAPS_WITHIN)) * len(gaps),
    }


def summary(outcomes: Sequence[Outcome], slo: SloTargets) -> Figures:
    """The figures of a run that sent at least one request."""
    done = [each for each in outcomes if not each.cause]
    begin = min(each.due_s for each in outcomes)
    duration_s = max(1e-9, max(each.due_s + each.ended_s for each in outcomes) - begin)
    targets = [kept(each, slo) for each in outcomes]
    good = sum(all(each.values()) for each in targets)
    prompt_tokens = sum(each.prompt_tokens or 0 for each in done)
    output_tokens = sum(each.output_tokens for each in done)
    cached = [each.cached_tokens for each in done if each.cached_tokens is not None]
    means = [mean for each in done if (mean := tpot_s(each)) is not None]
    return Figures(
        requests=len(outcomes),
        failed=len(outcomes) - len(done),
        causes=dict(Counter(each.cause for each in outcomes if each.cause).most_common()),
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        requests_per_s=len(done) / duration_s,
        prompt_tokens_per_s=prompt_tokens / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        goodput=good / duration_s,
        good_share=good / len(outcomes),
        met={
            name: sum(each[name] for each in targets) / len(outcomes)
            for name in ("ttft", "tpot", "itl")
        },
        ttft=Spread.of([ttft_s(each) for each in done]),
        tpot=Spread.of(means),
        itl=Spread.of([gap for each in done for gap in gaps_s(each)]),
        end_to_end=Spread.of([each.ended_s for each in done]),
        late=Spread.of([each.late_s for each in outcomes]),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
