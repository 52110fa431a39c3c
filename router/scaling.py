"""What an autoscaler reads of a router: how full each pool is, as gauges worked out at each scrape.

Made by router/main.py from the fleet and dispatch; it keeps nothing of its own. Only ready workers
count: a pool is as large as what can take requests. Every router sees the whole fleet, so that
values of several routers are alternatives and never to be added up.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge

from router.fleet.worker import Role, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus
from router.observer import CACHE_WINDOW, CacheHit, cache_hits
from router.timeline import RequestTimeline

Ready = Sequence[tuple[WorkerInfo, WorkerLoad]]


class Statuses(Protocol):
    """What is read of the fleet."""

    @property
    def statuses(self) -> Sequence[WorkerStatus]:
        """Every known worker."""


class Requests(Protocol):
    """What is read of dispatch."""

    def recent(self, count: int) -> Sequence[RequestTimeline]:
        """The latest requests, newest first."""

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until the prompt of a new request would begin."""


def show_scaling_signals(
    registry: CollectorRegistry, fleet: Statuses, requests: Requests, *, assumed_tokens_per_s: float
) -> None:
    """Declare the gauges.

    Args:
        registry: of this process.
        fleet: asked at each scrape.
        requests: asked at each scrape.
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
        (
            "prefill_tokens_per_second",
            "Mean of the measured prefill rates of ready workers, by pool; 0 until one is known.",
            prefill_rate,
        ),
        (
            "cache_hit_ratio",
            "Share of the prompt tokens of recent requests that prefix caches spared, by pool.",
            lambda ready: hit_ratio(ready, cache_hits(requests.recent(CACHE_WINDOW))),
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
    ).set_function(lambda: requests.predicted_wait_s)


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


def prefill_rate(ready: Ready) -> float:
    """Prompt tokens per second of one worker, of those that have measured it; 0 if none has."""
    known = [load.prefill_tokens_per_s for _, load in ready if load.prefill_tokens_per_s]
    return sum(known) / max(1, len(known))


def hit_ratio(ready: Ready, hits: Mapping[str, CacheHit]) -> float:
    """Cached prompt tokens over prompt tokens; 0 while there are none."""
    found = [hits.get(info.worker_id, CacheHit()) for info, _ in ready]
    return sum(hit.cached_tokens for hit in found) / max(1, sum(hit.prompt_tokens for hit in found))
