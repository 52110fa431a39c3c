"""What autoscaling keeps and what it saves, in virtual time, beside pools of fixed size.

    python -m benchmarks.autoscaling --save

The policy is that of `diptych autoscale`, with its defaults; the fixed fleet is what `diptych plan`
finds for the busiest half hour, with its headroom. Two loads: a step to three times the rate and
back, and a day between a fifth of its peak and the peak.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.elastic_fleet import ElasticFleet, Replay, load_of, replay
from benchmarks.modelled_hardware import llama_70b_on_eight_h200
from benchmarks.report import Report
from diptych.autoscale.policy import Pace, PoolScaler
from diptych.autoscale.settings import AutoscaleSettings
from diptych.autoscale.signals import SignalWindow
from diptych.planning.fleet import Slo
from diptych.planning.search import Bench, Caches, Cost, Fleet, smallest_fleet
from diptych.planning.trace import TracedRequest, faster
from diptych.planning.workers import Events

HOUR_S = 3600.0
PEAK, PROMPT_TOKENS, OUTPUT_TOKENS = 6.0, 16_000.0, 800.0
SLO = Slo(ttft_s=4.0, tpot_s=0.025, share=0.95)
HEADROOM = 0.2
"""Of the fixed fleet; the default of `diptych plan`."""
START_S = 90.0
"""From asking for a replica until it takes requests: weights from a disk of the node."""
RATES = replace(llama_70b_on_eight_h200(), kv_tokens=400_000, max_num_seqs=64)
"""Small batches, so that decode has to scale too."""


def step(at: float) -> float:
    """A third of the peak, half an hour of the peak, a third again."""
    return PEAK if HOUR_S / 2 <= at < HOUR_S else PEAK / 3


def day(at: float) -> float:
    """Least at the ends of 24 hours, a fifth of the peak; most in the middle."""
    return PEAK * (0.6 - 0.4 * math.cos(2 * math.pi * at / (24 * HOUR_S)))


def fixed_fleet(load: Sequence[TracedRequest], peak_at: float) -> Fleet:
    """The smallest fleet for the busiest half hour."""
    from_s, to_s = peak_at - HOUR_S / 4, peak_at + HOUR_S / 4
    busiest = [each for each in load if from_s <= each.arrives_at < to_s]
    busiest = [replace(each, arrives_at=each.arrives_at - from_s) for each in busiest]
    more = faster(busiest, 1 + HEADROOM)
    bench = Bench(more, Caches(hit_ratio=0.0), RATES, SLO)
    return smallest_fleet(bench, Cost(), max_replicas=64)


def scaled(load: Sequence[TracedRequest], first: Fleet) -> Replay:
    """Play a load on a fleet that the policy scales with its defaults."""
    settings = AutoscaleSettings(
        prefill="deployment/p",
        decode="deployment/d",
        backlog_s=SLO.ttft_s / 4,
        itl_s=SLO.tpot_s,
        prefill_max=32,
        decode_max=32,
    )
    fleet = ElasticFleet(events=Events(), rates=RATES, start_s=START_S)
    fleet.scale("prefill", first.prefill, at_once=True)
    fleet.scale("decode", first.decode, at_once=True)
    pace: Pace = settings.pace(1, 32)
    return replay(
        load,
        fleet,
        {"prefill": PoolScaler(pace), "decode": PoolScaler(pace)},
        SignalWindow(settings.targets, settings.window_s),
        SLO,
        interval_s=settings.interval_s,
    )


def main() -> None:
    """Play both loads and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", nargs="*", default=["step", "day"])
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    report = Report("autoscaling", vars(arguments))
    loads: dict[str, tuple[Callable[[float], float], float, float]] = {
        "step": (step, 2 * HOUR_S, 0.75 * HOUR_S),
        "day": (day, 24 * HOUR_S, 12 * HOUR_S),
    }
    for name in arguments.loads:
        rate, span_s, peak_at = loads[name]
        load = load_of(
            rate, peak=PEAK, span_s=span_s,
            prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS,
        )  # fmt: skip
        fixed = fixed_fleet(load, peak_at)
        bench = Bench(load, Caches(hit_ratio=0.0), RATES, SLO)
        at_first = Fleet(prefill=max(1, fixed.prefill // 3), decode=max(1, fixed.decode // 3))
        result = scaled(load, at_first)
        hours = (fixed.prefill + fixed.decode) * span_s / HOUR_S
        report.add(f"{name}: requests", len(load), "")
        report.add(f"{name}: fixed fleet, prefill replicas", fixed.prefill, "")
        report.add(f"{name}: fixed fleet, decode replicas", fixed.decode, "")
        report.add(f"{name}: fixed fleet, requests within the SLO", bench.outcome(fixed).good, "x")
        report.add(f"{name}: fixed fleet, replica-hours", hours, "h")
        report.add(f"{name}: scaled, requests within the SLO", result.good, "x", goal=">= 0.95")
        report.add(f"{name}: scaled, replica-hours", sum(result.replica_hours.values()), "h")
        used = sum(result.replica_hours.values()) / hours
        report.add(f"{name}: replica-hours scaled / fixed", used, "x")
        for role in ("prefill", "decode"):
            report.add(f"{name}: scaled, most {role} replicas", result.peak(role), "")
            report.add(f"{name}: scaled, {role} turns up or down", result.turns(role), "")
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
