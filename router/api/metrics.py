"""Prometheus metrics of the HTTP side. Declared once, observed by router/api."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.errors import ErrorCode
from router.api.errors import ClientDisconnectedError, error_answer
from router.api.slo import Pace, SloMetrics, SloTargets
from telemetry.loop_histogram import LoopHistogram, LoopSeries
from telemetry.metrics import (
    ITL_BUCKETS_S,
    REQUEST_BUCKETS_S,
    REQUEST_TOKENS_BUCKETS,
    TTFT_BUCKETS_S,
    start_at_zero,
)

OUTCOMES = ("ok", "disconnected", "shutdown", *ErrorCode)
PHASES = ("body", "waiting", "streaming", "answering")
_TOO_MANY_REQUESTS = 429


class ApiMetrics:
    """One per router process; labels are bounded."""

    def __init__(self, registry: CollectorRegistry, targets: SloTargets) -> None:
        self.slo = SloMetrics(registry, targets)
        self.time_to_first_token = Histogram(
            "diptych_router_time_to_first_token_seconds",
            "From reading a request to writing its first token, per choice.",
            ["api"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = LoopHistogram(
            "diptych_router_inter_token_latency_seconds",
            "Gap between two consecutive arrivals of tokens of one choice.",
            "api",
            buckets=ITL_BUCKETS_S,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "diptych_router_time_per_output_token_seconds",
            "Mean time per token after the first, per choice.",
            ["api"],
            buckets=ITL_BUCKETS_S,
            registry=registry,
        )
        self.request_duration = Histogram(
            "diptych_router_request_duration_seconds",
            "From reading a request to the end of its answer.",
            ["api"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.requests = Counter(
            "diptych_router_requests_total",
            "Requests answered; outcome is ok, disconnected or the error's code.",
            ["api", "outcome"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "diptych_router_requests_in_flight",
            "Requests being answered.",
            ["api"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "diptych_router_prompt_tokens_total",
            "Prompt tokens of admitted requests.",
            registry=registry,
        )
        self.generation_tokens = Counter(
            "diptych_router_generation_tokens_total",
            "Generated tokens that were read from the workers.",
            registry=registry,
        )
        self.disconnects = Counter(
            "diptych_router_client_disconnects_total",
            "Clients that left before their answer was complete; phase is body, waiting, "
            "streaming or answering.",
            ["api", "phase"],
            registry=registry,
        )
        self.cached_tokens = Counter(
            "diptych_router_cached_tokens_total",
            "Prompt tokens of completed sequences that a worker's cache spared.",
            registry=registry,
        )
        self.prompt_sizes = Histogram(
            "diptych_router_sequence_prompt_tokens",
            "Prompt tokens of each completed sequence.",
            buckets=REQUEST_TOKENS_BUCKETS,
            registry=registry,
        )
        self.output_sizes = Histogram(
            "diptych_router_sequence_generation_tokens",
            "Generated tokens of each completed sequence.",
            buckets=REQUEST_TOKENS_BUCKETS,
            registry=registry,
        )

        self.refusals = Counter(
            "diptych_router_refusals_total",
            "Requests answered 401, 403 or 429, by the error's code.",
            ["code"],
            registry=registry,
        )

    def of(self, endpoint: str) -> "EndpointMetrics":
        """The series of one endpoint that are observed per token, looked up once."""
        start_at_zero(self.requests, [endpoint], OUTCOMES)
        start_at_zero(self.disconnects, [endpoint], PHASES)
        return EndpointMetrics(
            time_to_first_token=self.time_to_first_token.labels(endpoint),
            inter_token_latency=self.inter_token_latency.labels(endpoint),
            time_per_output_token=self.time_per_output_token.labels(endpoint),
            request_duration=self.request_duration.labels(endpoint),
            in_flight=self.in_flight.labels(endpoint),
            slo=self.slo,
        )

    def completed(self, *, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        """A sequence ended well."""
        self.prompt_sizes.observe(prompt_tokens)
        self.output_sizes.observe(output_tokens)
        self.cached_tokens.inc(cached_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointMetrics:
    """Series of one endpoint."""

    time_to_first_token: Histogram
    inter_token_latency: LoopSeries
    time_per_output_token: Histogram
    request_duration: Histogram
    in_flight: Gauge
    slo: SloMetrics


class TokenTimer:
    """Observes when the tokens of one choice arrive, and judges it by the SLO."""

    def __init__(self, metrics: EndpointMetrics, started_at: float) -> None:
        self._metrics = metrics
        self._pace = Pace(started_at)
        self._longest_gap_s = metrics.slo.targets.itl_s

    def arrived(self, now: float, num_tokens: int) -> None:
        """Tokens of one turn were passed on to the client."""
        pace = self._pace
        pace.num_tokens += num_tokens
        if pace.first_at is None:
            pace.first_at = now
            self._metrics.time_to_first_token.observe(now - pace.started_at)
        else:
            gap_s = now - pace.last_at
            pace.gaps += 1
            pace.slow_gaps += gap_s > self._longest_gap_s
            self._metrics.inter_token_latency.observe(gap_s)
        pace.last_at = now

    def ended(self) -> None:
        """The choice is complete."""
        if (tpot_s := self._pace.tpot_s) is not None:
            self._metrics.time_per_output_token.observe(tpot_s)
        self._metrics.slo.ended(self._pace)

    def failed(self, error: Exception) -> None:
        """The choice ended with an error; one that is its client's says nothing about us."""
        if isinstance(error, ClientDisconnectedError):
            return
        status = error_answer(error).status
        if status >= 500 or status == _TOO_MANY_REQUESTS:
            self._metrics.slo.failed()
