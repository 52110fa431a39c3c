"""Gauges that autoscalers read: of ready workers only, per pool, never by zero."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry

from router.fleet.worker import Role, WorkerLoad, WorkerState, WorkerStatus
from router.observer import CacheHit
from router.scaling import hit_ratio, show_scaling_signals
from router.timeline import RequestTimeline
from tests.support.router_placement import make_info


@dataclass
class Fleet:
    statuses: Sequence[WorkerStatus]
    predicted_wait_s: float = 0.0

    def recent(self, count: int) -> list[RequestTimeline]:
        return []


def status(name: str, role: Role, load: WorkerLoad, *, attached: bool = True) -> WorkerStatus:
    about = make_info(role, name, num_blocks=100, max_num_seqs=10)
    return WorkerStatus(
        address=f"{name}:1",
        role=role,
        state=load.state,
        cause="" if attached else "not reached yet",
        info=about if attached else None,
        load=load,
    )


def shown(fleet: Fleet, name: str, role: str = "") -> float | None:
    registry = CollectorRegistry()
    show_scaling_signals(registry, fleet, fleet, assumed_tokens_per_s=100.0)
    return registry.get_sample_value(f"diptych_router_{name}", {"role": role} if role else {})


def test_a_pool_is_what_is_ready_and_measured_rates_win_over_the_assumed_one() -> None:
    fleet = Fleet(
        [
            status(
                "p0", Role.PREFILL, WorkerLoad(backlog_tokens=4000, prefill_tokens_per_s=1000.0)
            ),
            status("p1", Role.PREFILL, WorkerLoad(backlog_tokens=200)),
            status(
                "p2",
                Role.PREFILL,
                WorkerLoad(state=WorkerState.DRAINING, backlog_tokens=10**9),
            ),
            status("p3", Role.PREFILL, WorkerLoad(state=WorkerState.LOST), attached=False),
            status("d0", Role.DECODE, WorkerLoad(held_blocks=30, running=10, waiting=5)),
            status("d1", Role.DECODE, WorkerLoad(held_blocks=50, running=7)),
        ],
        predicted_wait_s=1.5,
    )
    assert shown(fleet, "pool_backlog_seconds", "prefill") == pytest.approx((4 + 2) / 2)
    assert shown(fleet, "pool_prefill_tokens_per_second", "prefill") == 1000
    assert shown(fleet, "pool_kv_usage_ratio", "decode") == pytest.approx(80 / 200)
    assert shown(fleet, "pool_batch_usage_ratio", "decode") == pytest.approx(22 / 20)
    assert shown(fleet, "pool_kv_usage_ratio", "prefill") == 0
    assert shown(fleet, "predicted_wait_seconds") == 1.5


def test_an_empty_pool_shows_nothing_to_do() -> None:
    for name in ("backlog_seconds", "kv_usage_ratio", "batch_usage_ratio"):
        assert shown(Fleet([]), f"pool_{name}", "decode") == 0


def test_cache_hits_are_those_of_the_pool() -> None:
    ready = [(make_info("prefill", "p"), WorkerLoad()), (make_info("prefill", "q"), WorkerLoad())]
    hits = {
        "p": CacheHit(requests=1, prompt_tokens=100, cached_tokens=80),
        "d": CacheHit(requests=1, prompt_tokens=900, cached_tokens=0),
    }
    assert hit_ratio(ready, hits) == 0.8
    assert hit_ratio(ready, {}) == 0
