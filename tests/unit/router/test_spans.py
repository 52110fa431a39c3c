"""Spans of finished requests: whose they are, when they were, and that they reach a collector."""

from collections.abc import Iterator
from typing import Any

import pytest

from core.errors import ConfigError, UnavailableError
from core.finish import FinishReason
from core.sampling import SamplingParams
from router.fleet.worker import LegEnd, StageTimes
from router.generation import GenerationEnd, GenerationRequest
from router.placement.decision import Mode, Placement
from router.spans import NoSpans, OtelSpans, Spans, open_spans
from router.timeline import RequestTimeline
from telemetry.trace_context import TraceContext
from tests.support.collector import Collector, collecting

pytest.importorskip("opentelemetry.sdk")

CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", sampled=True)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Collected:
    """An exporter that keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, batch: Any) -> None:
        self.spans += batch

    def shutdown(self) -> None:
        pass


def timeline(clock: Clock, trace: TraceContext | None = CALLER) -> RequestTimeline:
    request = GenerationRequest(
        request_id="r",
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(),
        deadline=200.0,
        received_at=99.0,
        tokenized_at=99.5,
        trace=trace,
    )
    return RequestTimeline(request=request, clock=clock)


def run(clock: Clock, line: RequestTimeline) -> None:
    """One hand-over from p1 to d1: received at 99, ended at 104."""
    placement = Placement(
        mode=Mode.DISAGGREGATED,
        worker="d",
        prefill="p",
        cached_tokens=0,
        why="test",
        rankings=(),
        refused=(),
    )

    def ended(worker: str, **times: float) -> None:
        end = LegEnd(
            request_id="r", attempt=1, reason=FinishReason.LENGTH, times=StageTimes(**times)
        )
        line.leg_ended(worker, end)

    line.placed(1, placement, {"prefill": "p1", "decode": "d1"})
    clock.now = 102.0
    line.tokens(1)
    clock.now = 103.0
    line.tokens(1)
    ended("p", queue_s=0.5, prefill_s=1.0)
    ended("d", transfer_s=0.25, decode_queue_s=0.0, first_decode_s=0.25)
    clock.now = 104.0
    line.ended(GenerationEnd(finish_reason=FinishReason.LENGTH, cached_tokens=2), None)
    line.closed()


def collect(line: RequestTimeline, clock: Clock, ratio: float = 1.0) -> list[Any]:
    exporter = Collected()
    spans = OtelSpans(
        exporter,  # type: ignore[arg-type]
        router_id="r1",
        ratio=ratio,
        clock=clock,
        wall_clock=lambda: 1000.0 + clock.now,
    )
    spans.closed(line)
    spans.close()
    return exporter.spans


def test_each_stage_is_a_span_of_the_process_that_spent_it() -> None:
    clock = Clock()
    line = timeline(clock)
    run(clock, line)
    *stages, root = collect(line, clock)
    assert root.name == "generate"
    assert f"{root.context.trace_id:032x}" == CALLER.trace_id
    assert f"{root.parent.span_id:016x}" == CALLER.span_id
    assert all(each.parent.span_id == root.context.span_id for each in stages)
    found = {
        each.name: (
            each.resource.attributes["service.name"],
            each.resource.attributes["service.instance.id"],
            (each.start_time - 1000_000_000_000) / 1e9,
            (each.end_time - 1000_000_000_000) / 1e9,
        )
        for each in (root, *stages)
    }
    assert found == {
        "generate": ("diptych-router", "r1", 99.0, 104.0),
        "tokenize": ("diptych-router", "r1", 99.0, 99.5),
        "route": ("diptych-router", "r1", 99.5, 100.0),
        "prefill_queue": ("diptych-prefill", "p1", 100.0, 100.5),
        "prefill": ("diptych-prefill", "p1", 100.5, 101.5),
        "prefill_rpc": ("diptych-router", "r1", 101.5, 102.0),
        "transfer": ("diptych-decode", "d1", 102.0, 102.25),
        "first_decode": ("diptych-decode", "d1", 102.25, 102.5),
        "handover_rpc": ("diptych-router", "r1", 102.5, 103.0),
        "decode": ("diptych-decode", "d1", 103.0, 104.0),
    }
    assert root.attributes["diptych.mode"] == "disaggregated"
    assert root.attributes["gen_ai.usage.input_tokens"] == 3
    assert root.attributes["gen_ai.usage.output_tokens"] == 2
    assert root.attributes["diptych.cached_tokens"] == 2
    assert root.status.is_unset


def test_a_failure_is_told_by_the_root() -> None:
    clock = Clock()
    line = timeline(clock, None)
    clock.now = 101.0
    line.ended(None, UnavailableError("nobody is there"))
    line.closed()
    *_, root = collect(line, clock)
    assert root.parent is None
    assert not root.status.is_ok and root.status.description == "nobody is there"


@pytest.mark.parametrize(
    ("caller", "ratio", "traced"),
    [(True, 0.0, True), (False, 1.0, False), (None, 0.0, False), (None, 1.0, True)],
)
def test_the_caller_decides_else_the_ratio(caller: bool | None, ratio: float, traced: bool) -> None:
    clock = Clock()
    trace = None if caller is None else TraceContext(CALLER.trace_id, CALLER.span_id, caller)
    line = timeline(clock, trace)
    run(clock, line)
    assert bool(collect(line, clock, ratio)) is traced


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


def opened(endpoint: str | None, clock: Clock) -> Spans:
    return open_spans(endpoint, router_id="r1", ratio=1.0, clock=clock)


def test_a_collector_gets_the_trace(collector: Collector) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    clock = Clock()
    line = timeline(clock)
    run(clock, line)
    spans = opened(f"{collector.url}/", clock)
    spans.closed(line)
    spans.close()
    path, body = collector.got.get(timeout=5)
    assert path == "/v1/traces"
    request = ExportTraceServiceRequest()
    # Compressed or not is the SDK's business; it says nothing of it here, so it is not.
    request.ParseFromString(body)
    services = {
        attribute.value.string_value
        for each in request.resource_spans
        for attribute in each.resource.attributes
        if attribute.key == "service.name"
    }
    assert services == {"diptych-router", "diptych-prefill", "diptych-decode"}


def test_a_collector_that_is_gone_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    import threading
    import time

    clock = Clock()
    line = timeline(clock)
    run(clock, line)
    before = set(threading.enumerate())
    spans = opened("http://127.0.0.1:9", clock)
    begun = time.monotonic()
    spans.closed(line)
    assert time.monotonic() - begun < 0.5
    spans.close()
    assert time.monotonic() - begun < 8
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), "nobody goes on trying"


def test_without_an_endpoint_there_are_no_spans() -> None:
    assert isinstance(opened(None, Clock()), NoSpans)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"diptych\[tracing\]"):
        opened("http://127.0.0.1:9", Clock())
