"""Prometheus metrics of the fleet side. Declared once, observed by dispatch."""

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.fleet.worker import Role, WorkerState
from telemetry.metrics import TTFT_BUCKETS_S

DECISION_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
RATIO_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ATTEMPT_BUCKETS = (1, 2, 3, 4, 6, 8)


class FleetMetrics:
    """One per router process; labels are bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._workers = Gauge(
            "diptych_router_workers",
            "Workers that the router knows, by pool and state.",
            ["role", "state"],
            registry=registry,
        )
        self.routing = Counter(
            "diptych_router_routing_total",
            "Attempts placed, by how their phases are spread over workers.",
            ["mode"],
            registry=registry,
        )
        self.retries = Counter(
            "diptych_router_retries_total",
            "Attempts that failed and were followed by another, by cause.",
            ["reason"],
            registry=registry,
        )
        self.attempts = Histogram(
            "diptych_router_attempts",
            "Attempts per generation.",
            buckets=ATTEMPT_BUCKETS,
            registry=registry,
        )
        self.generations = Counter(
            "diptych_router_generations_total",
            "Generations ended; outcome is a finish reason, cancelled or an error's code.",
            ["outcome"],
            registry=registry,
        )
        self.prefix_match = Histogram(
            "diptych_router_prefix_match_ratio",
            "Part of the prompt predicted to be cached on the worker that computes it.",
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self.decision = Histogram(
            "diptych_router_decision_seconds",
            "Time to choose the workers of one attempt, hashing included.",
            buckets=DECISION_BUCKETS_S,
            registry=registry,
        )
        self.stages = Histogram(
            "diptych_router_stage_seconds",
            "Time of one generation by stage of its ledger.",
            ["stage"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "diptych_router_generations_in_flight", "Generations admitted.", registry=registry
        )
        self.queued = Gauge(
            "diptych_router_generations_queued",
            "Generations in the router's queue.",
            registry=registry,
        )
        self.queue_wait = Histogram(
            "diptych_router_queue_wait_seconds",
            "Time in the router's queue.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.shed = Counter(
            "diptych_router_shed_total",
            "Generations refused with 429: at their arrival, or pushed out of the full queue.",
            ["reason"],
            registry=registry,
        )
        self.waiting = Gauge(
            "diptych_router_generations_waiting",
            "Generations that no worker can take at the moment.",
            registry=registry,
        )
        self.cache_events = Counter(
            "diptych_router_cache_events_total",
            "Cache events of workers, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        self.resyncs = Counter(
            "diptych_router_resyncs_total",
            "Cache events that showed that others were lost.",
            registry=registry,
        )
        self.indexed_blocks = Gauge(
            "diptych_router_indexed_blocks",
            "Distinct KV blocks known or predicted to be cached on some worker.",
            registry=registry,
        )
        self.breakers = Gauge(
            "diptych_router_breakers_open",
            "Workers, or pairs of a prefill and a decode worker, that are not trusted now.",
            ["scope"],
            registry=registry,
        )
        self.breaker_openings = Counter(
            "diptych_router_breaker_openings_total",
            "Times that failures shut out a worker, or a pair of them.",
            ["scope"],
            registry=registry,
        )
        self.stale_messages = Counter(
            "diptych_router_stale_messages_total",
            "Messages about a request or an attempt that is over.",
            registry=registry,
        )

    def count_workers(self, workers: Iterable[tuple[Role, WorkerState]]) -> None:
        """Show how many workers of each role are in each state."""
        tally = Tally(workers)
        for role in Role:
            for state in WorkerState:
                self._workers.labels(role.value, state.value).set(tally[role, state])
