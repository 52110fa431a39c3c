"""From what routers expose to shares and strains."""

import math
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from diptych.autoscale.signals import Reading, SignalWindow, Targets, quantile, read_router
from router.api.metrics import ApiMetrics
from router.api.slo import SloTargets
from router.fleet.worker import Role, WorkerLoad, WorkerState, WorkerStatus
from router.metrics import FleetMetrics
from router.scaling import show_scaling_signals
from tests.support.router_placement import make_info

TARGETS = Targets(backlog_s=0.5, busy=0.5, kv=0.8, batch=0.8, itl_s=0.05)
READING = Reading(
    at=0.0,
    ready={"prefill": 2, "decode": 1},
    backlog_s=1.0,
    kv=0.4,
    batch=0.2,
    prompt_tokens=0.0,
    gaps={0.05: 0.0, math.inf: 0.0},
    hit_ratio=0.5,
    prefill_tokens_per_s=1000.0,
)


def later(at: float, tokens: float, **changes: object) -> Reading:
    return replace(READING, at=at, prompt_tokens=tokens, **changes)  # type: ignore[arg-type]


class Fleet:
    predicted_wait_s = 0.0

    def __init__(self) -> None:
        prefill = WorkerLoad(backlog_tokens=3000, prefill_tokens_per_s=1500.0)
        decode = WorkerLoad(held_blocks=250, running=6)
        self.statuses = [
            WorkerStatus(
                address=role,
                role=Role(role),
                state=WorkerState.READY,
                cause="",
                info=make_info(role),
                load=load,
            )
            for role, load in (("prefill", prefill), ("decode", decode))
        ]

    def recent(self, count: int) -> list:
        return []


def test_what_a_real_router_exposes_is_read() -> None:
    registry, fleet = CollectorRegistry(), Fleet()
    fleet_metrics, api = FleetMetrics(registry), ApiMetrics(registry, SloTargets())
    show_scaling_signals(registry, fleet, fleet, assumed_tokens_per_s=1.0)
    fleet_metrics.watch_workers(lambda: [(each.role, each.state) for each in fleet.statuses])
    api.prompt_tokens.inc(700)
    for endpoint in ("chat", "completions"):
        api.inter_token_latency.labels(endpoint).observe(0.03)
    reading = read_router(generate_latest(registry).decode(), at=5.0)
    assert reading.at == 5.0
    assert reading.ready == {"prefill": 1, "decode": 1}
    assert reading.backlog_s == 2.0
    assert (reading.kv, reading.batch) == (0.25, 0.75)
    assert reading.prompt_tokens == 700
    assert reading.gaps[math.inf] == 2
    assert (reading.hit_ratio, reading.prefill_tokens_per_s) == (0.0, 1500.0)


def test_what_is_no_router_is_refused() -> None:
    with pytest.raises((KeyError, ValueError)):
        read_router("# nothing", at=0.0)


def test_counters_of_several_routers_add_up_and_gauges_do_not() -> None:
    window = SignalWindow(TARGETS, 60.0)
    window.add({"a": later(0, 0), "b": later(0, 10_000)})
    signals = window.signals(complete=True)
    assert signals.prefill.shares == {"busy share": None}, "no rate is known after one reading"
    window.add({"a": later(20, 8_000), "b": later(20, 30_000, backlog_s=3.0)})
    signals = window.signals(complete=False)
    # (400 + 1000) tokens per second, half of them cached, on two workers of 1000 each.
    assert signals.prefill.shares["busy share"] == pytest.approx(0.35 / 0.5)
    assert signals.prefill.strains["backlog"] == pytest.approx((1.0 + 3.0) / 2 / 0.5)
    assert signals.decode.shares == pytest.approx({"KV occupancy": 0.5, "batch occupancy": 0.25})
    assert (signals.prefill.ready, signals.decode.ready) == (2, 1)
    assert not signals.prefill.complete
    assert signals.decode.strains == {"ITL": None}


def test_a_router_that_started_again_has_no_rate_for_a_while() -> None:
    window = SignalWindow(TARGETS, 60.0)
    window.add({"a": later(0, 50_000)})
    window.add({"a": later(15, 100)})
    assert window.signals(complete=True).prefill.shares == {"busy share": None}
    window.add({"a": later(30, 15_100)})
    assert window.signals(complete=True).prefill.shares["busy share"] == pytest.approx(0.5)


def test_only_the_window_counts() -> None:
    window = SignalWindow(TARGETS, 60.0)
    for at in range(0, 300, 15):
        tokens = 0 if at < 200 else (at - 195) * 1000
        gaps = {0.05: at * 1.0, math.inf: at * 1.0}
        window.add({"a": later(at, tokens, gaps=gaps)})
    signals = window.signals(complete=True)
    assert signals.prefill.shares["busy share"] == pytest.approx(1000 / 2 / 2000 / 0.5)
    assert signals.decode.strains["ITL"] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        ({}, None),
        ({1.0: 0, math.inf: 0}, None),
        ({1.0: 10, 2.0: 10, math.inf: 10}, 0.95),
        ({1.0: 90, 2.0: 100, math.inf: 100}, 1.5),
        ({1.0: 90, math.inf: 100}, 1.0),
    ],
)
def test_quantile_is_that_of_promql(counts: dict[float, float], value: float | None) -> None:
    found = quantile(0.95, counts)
    assert found == (None if value is None else pytest.approx(value))
