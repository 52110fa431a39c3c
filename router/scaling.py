"""What an autoscaler reads of a router: how full each pool is, as gauges worked out at each scrape.

Made by router/main.py from the fleet and dispatch; it keeps nothing of its own. Only ready workers
count: a pool is as large as what can take requests. Every router sees the whole fleet, so that
values of several routers are alternatives and never to be added up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge

from router.fleet.worker import Role, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus

Ready = Sequence[tuple[WorkerInfo, WorkerLoad]]


class Statuses(Protocol):
    """What is read of the fleet."""

    @property
    def statuses(self) -> Sequence[WorkerStatus]:
        """Every known worker."""


class Waits(Protocol):
    """What is read of dispatch."""

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until the prompt of a new request would begin."""


def show_scaling_signals(
    registry: CollectorRegistry, fleet: Statuses, waits: Waits, *, assumed_tokens_per_s: float
) -> None:
    """Declare the gauges.

    Args:
        registry: of this process.
        fleet: asked at each scrape.
        waits: asked at each scrape.
        assumed_tokens_per_s: prefill rate of a worker that has not measured its own.
    """
    pools: tuple[tuple[str, str, Callable[[Ready], float]], ...] = (
        (
            "backlog_seconds",
            "Mean of the ready workers' seconds of prompts to compute, by pool.",
            lambda ready: backlog_s(ready, assumed_tokens_per_s),
        ),
        (
            "kv_usage_ratio",
            "Share of the KV blocks of all ready workers that are held, by pool.",
            kv_usage,
        ),
        (
            "batch_usage_ratio",
            "Sequences of all ready workers over the most that run at once, by pool.",
            batch_usage,
        ),
    )
    for name, text, measure in pools:
        gauge = Gauge(f"diptych_router_pool_{name}", text, ["role"], registry=registry)
        for role in Role:
            gauge.labels(role.value).set_function(partial(_measured, fleet, role, measure))
    Gauge(
        "diptych_router_predicted_wait_seconds",
        "What a new request of normal priority would wait before its prompt begins.",
        registry=registry,
    ).set_function(lambda: waits.predicted_wait_s)


def _measured(fleet: Statuses, role: Role, measure: Callable[[Ready], float]) -> float:
    return measure(ready_workers(fleet.statuses, role))


def ready_workers(statuses: Sequence[WorkerStatus], role: Role) -> Ready:
    """Workers of a pool that take requests."""
    return [
        (status.info, status.load)
        for status in statuses
        if status.info is not None and status.role is role and status.state is WorkerState.READY
    ]


def backlog_s(ready: Ready, assumed_tokens_per_s: float) -> float:
    """Seconds of prompts that one worker has to compute, on average; 0 of an empty pool."""
    each = [
        load.backlog_tokens / (load.prefill_tokens_per_s or assumed_tokens_per_s)
        for _, load in ready
    ]
    return sum(each) / max(1, len(each))


def kv_usage(ready: Ready) -> float:
    """Held blocks over blocks; 0 of an empty pool."""
    return sum(load.held_blocks for _, load in ready) / max(
        1, sum(info.num_blocks for info, _ in ready)
    )


def batch_usage(ready: Ready) -> float:
    """Sequences that run or wait over the most that run at once; 0 of an empty pool."""
    return sum(load.running + load.waiting for _, load in ready) / max(
        1, sum(info.max_num_seqs for info, _ in ready)
    )
