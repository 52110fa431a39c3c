"""Prometheus metrics of the fleet side. Declared once, observed by dispatch."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.errors import RETRYABLE, ErrorCode
from core.finish import FinishReason
from router.fleet.worker import Role, WorkerState
from router.placement.decision import Mode
from router.placement.prefix_index import Applied
from router.timeline import STAGES
from router.watchdog import Stage
from telemetry.ledger import StageLedger
from telemetry.metrics import STAGE_BUCKETS_S, TTFT_BUCKETS_S, start_at_zero

DECISION_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
RATIO_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ATTEMPT_BUCKETS = (1, 2, 3, 4, 6, 8)
_GOOD_ENDS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORTED)


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
        self.stuck = Counter(
            "diptych_router_stuck_total",
            "Attempts taken from a worker that had lost them without a word, by stage.",
            ["stage"],
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
        stages = Histogram(
            "diptych_router_stage_seconds",
            "Time of one generation by stage of its ledger.",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self._unattributed_s = Counter(
            "diptych_router_unattributed_seconds_total",
            "Time of generations that no stage of a ledger can explain.",
            registry=registry,
        )
        self._overrun_s = Counter(
            "diptych_router_overrun_seconds_total",
            "Time that workers reported beyond what their generations took; cut from ledgers.",
            registry=registry,
        )
        self.backlog = Gauge(
            "diptych_router_backlog_seconds",
            "Prompts that the least busy worker has to compute before one more.",
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
        start_at_zero(self.routing, Mode)
        start_at_zero(self.retries, sorted(RETRYABLE))
        start_at_zero(self.stuck, Stage)
        start_at_zero(self.generations, [*_GOOD_ENDS, "cancelled", *ErrorCode])
        start_at_zero(self.shed, ("refused", "pushed_out"))
        start_at_zero(self.cache_events, [applied.name.lower() for applied in Applied])
        self._stages = {stage: stages.labels(stage) for stage in STAGES}

    def account(self, ledger: StageLedger) -> None:
        """Take in the ledger of a generation that is over."""
        for stage in ledger.stages:
            self._stages[stage.name].observe(stage.seconds)
        self._unattributed_s.inc(ledger.unattributed_s)
        self._overrun_s.inc(ledger.overrun_s)

    def watch_workers(self, census: Callable[[], Iterable[tuple[Role, WorkerState]]]) -> None:
        """Show how many workers of each role are in each state, asked at each scrape."""

        def shown(role: Role, state: WorkerState) -> None:
            def count() -> float:
                return sum(each == (role, state) for each in census())

            self._workers.labels(role.value, state.value).set_function(count)

        for role in Role:
            for state in WorkerState:
                shown(role, state)
