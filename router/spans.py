"""Turns a request's time ledger into spans of a trace, and sends them to a collector.

Called by dispatch when a request is over. The router makes the spans of all processes: the ledger
has laid the workers' own durations out on the router's clock, so no two clocks have to agree.
Each span is said to come from the process whose time it was. Invariant: nothing here waits, and a
collector that is slow or gone costs spans, never requests.
"""

import time
from collections.abc import Callable, Mapping
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from core.clock import Clock
from core.errors import ConfigError
from router.placement.decision import Mode
from router.timeline import RequestTimeline, StageSpan

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_LAST_SEND_S = 3.0
_GIVE_UP_S = 1.0
_MAX_PROCESSES = 1024
"""Workers that are told apart; in a fleet that restarts often the oldest names are forgotten."""
_PREFILL_STAGES = frozenset({"prefill_queue", "prefill"})
_DECODE_STAGES = frozenset({"transfer", "decode_queue", "first_decode", "decode"})


class Spans(Protocol):
    """Where finished requests go to be traced."""

    def closed(self, timeline: RequestTimeline) -> None:
        """A request is over."""

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""


class NoSpans:
    """Implements Spans where no collector is named."""

    def closed(self, timeline: RequestTimeline) -> None:
        """See Spans."""

    def close(self) -> None:
        """See Spans."""


class OtelSpans:
    """Implements Spans with the OpenTelemetry SDK."""

    def __init__(
        self,
        exporter: "SpanExporter",
        *,
        router_id: str,
        ratio: float,
        clock: Clock,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the thread that sends.

        Args:
            exporter: of the SDK; owned from here on.
            router_id: this process, `service.instance.id`.
            ratio: share of the requests without a trace of their own that are traced. A request
                that belongs to a trace does as its caller does.
            clock: of timelines.
            wall_clock: seconds since 1970.
        """
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        self._exporter = exporter
        self._processor = BatchSpanProcessor(exporter)
        self._sampler = ParentBased(TraceIdRatioBased(ratio))
        self._router_id = router_id
        self._clock = clock
        self._wall_clock = wall_clock
        self._providers: dict[tuple[str, str], TracerProvider] = {}

    def closed(self, timeline: RequestTimeline) -> None:
        """See Spans."""
        from opentelemetry import trace

        zero = self._wall_clock() - self._clock()
        stages = timeline.spans

        def nanoseconds(moment: float) -> int:
            return int((zero + moment) * 1e9)

        root = self._tracer("router", self._router_id).start_span(
            "generate",
            context=_caller(timeline),
            kind=trace.SpanKind.SERVER,
            start_time=nanoseconds(timeline.request.received_at),
            attributes=_attributes(timeline),
        )
        if timeline.error is not None:
            root.set_status(trace.StatusCode.ERROR, timeline.error.message)
        inside = trace.set_span_in_context(root)
        for stage in stages:
            role, process = self._whose(timeline, stage)
            attributes = {"diptych.attempt": stage.attempt} if stage.attempt else {}
            span = self._tracer(role, process).start_span(
                stage.name,
                context=inside,
                start_time=nanoseconds(stage.began_at),
                attributes=attributes,
            )
            span.end(nanoseconds(stage.ended_at))
        end = stages[-1].ended_at if stages else timeline.request.tokenized_at
        root.end(nanoseconds(end))

    def close(self) -> None:
        """See Spans."""
        # The SDK would wait half a minute for a collector that does not answer.
        last = Thread(target=self._processor.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(_LAST_SEND_S)
        if last.is_alive():
            self._exporter.shutdown()  # which ends its waiting for the next try
            last.join(_GIVE_UP_S)

    def _whose(self, timeline: RequestTimeline, stage: StageSpan) -> tuple[str, str]:
        """Role and name of the process that spent a stage's time."""
        placed = timeline.placement(stage.attempt)
        if placed is not None and stage.name in _PREFILL_STAGES | _DECODE_STAGES:
            placement, workers = placed
            if stage.name in _PREFILL_STAGES and "prefill" in workers:
                return "prefill", workers["prefill"]
            role = "prefill" if placement.mode is Mode.PREFILL_ONLY else "decode"
            return role, workers["decode"]
        return "router", self._router_id

    def _tracer(self, role: str, process: str) -> Any:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        provider = self._providers.get((role, process))
        if provider is None:
            resource = Resource.create(
                {"service.name": f"diptych-{role}", "service.instance.id": process}
            )
            # One processor for all of them, shut down by `close`, not by each.
            provider = TracerProvider(self._sampler, resource, shutdown_on_exit=False)
            provider.add_span_processor(self._processor)
            self._providers[role, process] = provider
            while len(self._providers) > _MAX_PROCESSES:
                del self._providers[next(iter(self._providers))]
        return provider.get_tracer("diptych")


def open_spans(endpoint: str | None, *, router_id: str, ratio: float, clock: Clock) -> Spans:
    """Spans to a collector that takes OTLP over HTTP.

    Args:
        endpoint: its URL as in OTEL_EXPORTER_OTLP_ENDPOINT, without /v1/traces; None: no spans.
        router_id: this process.
        ratio: see OtelSpans.
        clock: of timelines.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NoSpans()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            "trace_endpoint is set, but OpenTelemetry is not installed: "
            f"pip install 'diptych[tracing]' ({error})."
        ) from error
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return OtelSpans(exporter, router_id=router_id, ratio=ratio, clock=clock)


def _caller(timeline: RequestTimeline) -> Any:
    """The client's span as context, or an empty one: never that of whoever calls us."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    caller = timeline.request.trace
    if caller is None:
        return Context()
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if caller.sampled else 0)
    parent = trace.SpanContext(
        int(caller.trace_id, 16), int(caller.span_id, 16), is_remote=True, trace_flags=flags
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())


def _attributes(timeline: RequestTimeline) -> Mapping[str, str | int]:
    """Of the whole request. Names of tokens as in OpenTelemetry's conventions for generative AI."""
    mode = timeline.mode
    return {
        "diptych.request_id": timeline.request.request_id,
        "diptych.outcome": timeline.outcome,
        **({"diptych.mode": mode.value} if mode is not None else {}),
        "diptych.attempts": len(timeline.attempts),
        "diptych.cached_tokens": timeline.cached_tokens,
        "gen_ai.usage.input_tokens": len(timeline.request.prompt_ids),
        "gen_ai.usage.output_tokens": timeline.num_tokens,
    }
