"""Prometheus metrics of the HTTP side. Declared once, observed by router/api."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from telemetry.metrics import ITL_BUCKETS_S, REQUEST_BUCKETS_S, TTFT_BUCKETS_S


class ApiMetrics:
    """One per router process; labels are bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.time_to_first_token = Histogram(
            "diptych_router_time_to_first_token_seconds",
            "From reading a request to writing its first token, per choice.",
            ["endpoint"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "diptych_router_inter_token_latency_seconds",
            "Gap between two consecutive arrivals of tokens of one choice.",
            ["endpoint"],
            buckets=ITL_BUCKETS_S,
            registry=registry,
        )
        self.request_duration = Histogram(
            "diptych_router_request_duration_seconds",
            "From reading a request to the end of its answer.",
            ["endpoint"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.requests = Counter(
            "diptych_router_requests_total",
            "Requests answered; outcome is ok, disconnected or the error's code.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "diptych_router_requests_in_flight",
            "Requests being answered.",
            ["endpoint"],
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
            "Clients that left before their answer was complete; phase is body, waiting or "
            "streaming.",
            ["endpoint", "phase"],
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
        return EndpointMetrics(
            time_to_first_token=self.time_to_first_token.labels(endpoint),
            inter_token_latency=self.inter_token_latency.labels(endpoint),
            request_duration=self.request_duration.labels(endpoint),
            in_flight=self.in_flight.labels(endpoint),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointMetrics:
    """Series of one endpoint."""

    time_to_first_token: Histogram
    inter_token_latency: Histogram
    request_duration: Histogram
    in_flight: Gauge


class TokenTimer:
    """Observes when the tokens of one choice arrive."""

    def __init__(self, metrics: EndpointMetrics, started_at: float) -> None:
        self._metrics = metrics
        self._last = started_at
        self._observe = metrics.time_to_first_token.observe

    def arrived(self, now: float) -> None:
        """Tokens of one turn were passed on to the client."""
        self._observe(now - self._last)
        self._last = now
        self._observe = self._metrics.inter_token_latency.observe
