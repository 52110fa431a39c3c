import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from telemetry import metrics
from telemetry.metrics import (
    ProcessRegistry,
    exposition,
    serve_metrics,
    show_build,
    start_at_zero,
)


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("diptych_things", "Things.", registry=registry).inc(2)
    return registry


class State:
    healthy = True
    ready = False


@asynccontextmanager
async def serving(registry: CollectorRegistry, state: State) -> AsyncIterator[int]:
    server = await serve_metrics(
        registry,
        "127.0.0.1",
        0,
        extra=lambda: [b"diptych_engine_steps_total 5.0"],
        healthy=lambda: state.healthy,
        ready=lambda: state.ready,
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


async def ask(port: int, request: bytes) -> bytes:
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


async def get(port: int, path: str) -> tuple[int, str]:
    answer = (await ask(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


def test_exposition_joins_own_and_foreign_text(registry: CollectorRegistry) -> None:
    text = exposition(registry, [b"", b"diptych_a 1.0", b"diptych_b 2.0\n"]).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"diptych_things", "diptych_a", "diptych_b"} <= names


@pytest.mark.parametrize(
    "name", [name for name in vars(metrics) if name.endswith("BUCKETS_S")], ids=str
)
def test_buckets_rise(name: str) -> None:
    buckets = getattr(metrics, name)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[0] > 0


async def test_scrape_shows_both_processes(registry: CollectorRegistry) -> None:
    async with serving(registry, State()) as port:
        status, body = await get(port, "/metrics?x=1")
    assert status == 200
    assert "diptych_things_total 2.0" in body
    assert "diptych_engine_steps_total 5.0" in body


async def test_probes_answer_what_is_true_now(registry: CollectorRegistry) -> None:
    state = State()
    async with serving(registry, state) as port:
        assert (await get(port, "/healthz"))[0] == 200
        assert (await get(port, "/readyz"))[0] == 503
        state.healthy, state.ready = False, True
        assert (await get(port, "/healthz"))[0] == 503
        assert (await get(port, "/readyz"))[0] == 200


async def test_other_paths_methods_and_noise_are_survived(registry: CollectorRegistry) -> None:
    async with serving(registry, State()) as port:
        assert (await get(port, "/nope"))[0] == 404
        assert b" 405 " in await ask(port, b"POST /metrics HTTP/1.1\r\n\r\n")
        head = await ask(port, b"HEAD /healthz HTTP/1.1\r\n\r\n")
        assert head.endswith(b"\r\n\r\n")
        assert await ask(port, b"noise\r\n\r\n") == b""
        assert await ask(port, b"x" * 20_000) == b""
        assert (await get(port, "/healthz"))[0] == 200


async def test_silent_client_is_dropped(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_REQUEST_TIMEOUT_S", 0.05)
    async with serving(registry, State()) as port:
        assert await ask(port, b"GET /metrics") == b""


async def test_taken_port_is_an_error_that_names_it(registry: CollectorRegistry) -> None:
    async with serving(registry, State()) as port:
        with pytest.raises(OSError, match=str(port)):
            await serve_metrics(registry, "127.0.0.1", port)


def test_labels_go_on_every_series_and_none_says_when_it_was_made() -> None:
    registry = ProcessRegistry()
    show_build(registry, "decode", "1.2")
    counter = Counter("diptych_ends", "Ends.", ["kind", "cause"], registry=registry)
    start_at_zero(counter, ("good", 'b"a}d {'), ("a", "b"))
    labels = {"role": "decode", "worker": 'd\\0 "x"\n{'}
    engine = b"# HELP diptych_steps Steps.\ndiptych_steps 3.0 17\n"
    text = exposition(registry, [engine], labels).decode()
    families = list(text_string_to_metric_families(text))
    samples = [sample for family in families for sample in family.samples]
    names = {"diptych_build_info", "diptych_ends_total", "diptych_steps"}
    assert {sample.name for sample in samples} == names
    assert len(samples) == 1 + 4 + 1
    for sample in samples:
        assert sample.labels.items() >= labels.items()
    ends = [sample for sample in samples if sample.name == "diptych_ends_total"]
    assert {sample.labels["kind"] for sample in ends} == {"good", 'b"a}d {'}
    assert {sample.value for sample in ends} == {0.0}
