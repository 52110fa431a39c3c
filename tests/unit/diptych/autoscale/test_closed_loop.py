"""Policy, signals and a modelled fleet in virtual time: load is followed, and nothing swings."""

from benchmarks.autoscaling import RATES
from benchmarks.elastic_fleet import ElasticFleet, Replay, load_of, replay
from diptych.autoscale.policy import Pace, PoolScaler
from diptych.autoscale.signals import SignalWindow, Targets
from diptych.planning.fleet import Slo
from diptych.planning.trace import TracedRequest
from diptych.planning.workers import Events

SLO = Slo(ttft_s=4.0, tpot_s=0.025, share=0.95)
TARGETS = Targets(backlog_s=1.0, busy=0.7, kv=0.75, batch=0.8, itl_s=SLO.tpot_s)
RATE = 4.0


def play(load: list[TracedRequest], *, first: tuple[int, int], pace: Pace | None = None) -> Replay:
    fleet = ElasticFleet(events=Events(), rates=RATES, start_s=60.0)
    fleet.scale("prefill", first[0], at_once=True)
    fleet.scale("decode", first[1], at_once=True)
    pace = pace or Pace(min_replicas=1, max_replicas=16)
    scalers = {"prefill": PoolScaler(pace), "decode": PoolScaler(pace)}
    window = SignalWindow(TARGETS, 60.0)
    return replay(load, fleet, scalers, window, SLO, interval_s=15.0)


def stepped(low: float, high: float) -> list[TracedRequest]:
    """Ten minutes low, twenty high, thirty low."""
    return load_of(
        lambda at: high if 600 <= at < 1800 else low,
        peak=high, span_s=3600, prompt_tokens=12_000, output_tokens=600,
    )  # fmt: skip


def test_a_step_is_followed_up_and_down_without_swinging() -> None:
    load = stepped(RATE / 4, RATE)
    result = play(load, first=(1, 1))
    sizes = result.sizes["prefill"]
    during = max(size for at, size in sizes if at < 1800)
    assert 3 <= during <= 8
    grown_at = next(at for at, size in sizes if size >= 3)
    assert grown_at <= 600 + 180
    assert sizes[-1][1] <= 2, "it shrinks again"
    assert result.turns("prefill") <= 3
    assert result.turns("decode") <= 3
    late = [each for each in result.late if not 600 <= each.arrives_at < 1000]
    assert len(late) <= 0.05 * len(load), "but for the time that new replicas take to start"


def test_a_steady_load_keeps_its_replicas() -> None:
    load = load_of(lambda _: RATE, peak=RATE, span_s=2400, prompt_tokens=12_000, output_tokens=600)
    result = play(load, first=(4, 2))
    assert result.turns("prefill") <= 1
    assert result.turns("decode") <= 1
    assert result.good >= 0.95


def test_a_curve_costs_less_than_its_peak_and_keeps_the_slo() -> None:
    span_s = 4 * 3600.0
    load = load_of(
        lambda at: RATE * (0.15 + 0.85 * (1 - abs(2 * at / span_s - 1)) ** 2),
        peak=RATE, span_s=span_s, prompt_tokens=12_000, output_tokens=600,
    )  # fmt: skip
    result = play(load, first=(1, 1))
    assert result.good >= 0.95
    for role in ("prefill", "decode"):
        assert result.turns(role) <= 5, result.sizes[role]
    hours = sum(result.replica_hours.values())
    at_peak = (result.peak("prefill") + result.peak("decode")) * span_s / 3600
    assert hours < 0.75 * at_peak


def test_a_fleet_that_may_not_grow_misses_the_slo() -> None:
    """So that the tests above can tell a policy from none."""
    result = play(stepped(RATE / 4, RATE), first=(1, 1), pace=Pace(min_replicas=1, max_replicas=1))
    assert result.good < 0.8
