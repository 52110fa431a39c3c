"""Wrong input and failing fleets: every answer is OpenAI-shaped, and the right one to blame."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from core.errors import (
    DiptychError,
    OverloadedError,
    UnavailableError,
    WorkerLostError,
)
from router.api.exchange import Exchange
from router.api.requests import ChatRequest, CompletionRequest
from router.api.settings import ApiSettings
from router.app import create_app
from tests.support.router_api import (
    Gate,
    NoFleet,
    Script,
    ScriptedGenerator,
    ScriptedView,
    Served,
    byte_text,
    client,
    raw_connection,
    says,
    serve,
    until,
)

CHAT: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve(
        ScriptedGenerator(lambda _: says("ok")), settings=ApiSettings(body_limit_bytes=100_000)
    ) as running:
        yield running


def _error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


async def test_unknown_paths_and_methods(http: httpx.AsyncClient) -> None:
    _error(await http.get("/v2"), 404, "not_found")
    _error(await http.get("/v1/models/"), 404, "model_not_found")
    answer = await http.get("/v1/chat/completions")
    assert "POST" in _error(answer, 405, "method_not_allowed")["message"]
    assert answer.headers["allow"] == "POST"


async def test_body_that_is_no_json_object(http: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"\\ud800"'):
            answer = await http.post(path, content=body, headers=headers)
            _error(answer, 400, "invalid_request")


async def test_other_media_types(http: httpx.AsyncClient) -> None:
    for headers in (
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ):
        answer = await http.post("/v1/completions", content=b"{}", headers=headers)
        _error(answer, 415, "unsupported_media_type")


async def test_every_endpoint_refuses_alike_and_repeats_no_key(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    paths = [
        path for path, verbs in document["paths"].items() if "requestBody" in verbs.get("post", {})
    ]
    assert len(paths) > 7
    key = {"authorization": "Bearer dk-of-somebody", "x-api-key": "dk-of-somebody"}
    for path in paths:
        for content, media, status, code in (
            (b'{"nonsense":1}', "application/json", 400, "invalid_request"),
            (b"x=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
            (b" " * 100_001, "application/json", 413, "request_too_large"),
        ):
            answer = await http.post(path, content=content, headers=key | {"content-type": media})
            assert _error(answer, status, code)["type"] == "invalid_request_error"
            assert "of-somebody" not in answer.text + str(answer.headers)
        _error(await http.put(path, headers=key), 405, "method_not_allowed")


async def test_too_large_a_body_declared_or_not(http: httpx.AsyncClient) -> None:
    async def undeclared() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    for content in (b" " * 200_000, undeclared()):
        answer = await http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert "100000" in _error(answer, 413, "request_too_large")["message"]


async def test_body_that_does_not_arrive() -> None:
    async with (
        serve(ScriptedGenerator(), settings=ApiSettings(body_timeout_s=0.05)) as served,
        raw_connection(served) as (reader, writer),
    ):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)


async def test_too_long_a_prompt_says_both_lengths(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "x" * 600})
    error = _error(answer, 400, "context_length_exceeded")
    assert error["param"] == "prompt"
    assert "600" in error["message"] and "512" in error["message"]
    answer = await http.post("/v1/completions", json={"prompt": "x" * 500, "max_tokens": 50})
    error = _error(answer, 400, "context_length_exceeded")
    assert "500" in error["message"] and "550" in error["message"] and "512" in error["message"]


async def test_unknown_model_names_the_served_one(http: httpx.AsyncClient) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = CHAT if "chat" in path else {"prompt": "x"}
        error = _error(await http.post(path, json=body | {"model": "gpt"}), 404, "model_not_found")
        assert "tiny" in error["message"]
        assert error["param"] == "model"
    _error(await http.get("/v1/models/gpt"), 404, "model_not_found")


async def test_completions_that_can_not_be(http: httpx.AsyncClient) -> None:
    cases: list[tuple[str, str | None]] = [
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": [[]]}', "prompt"),
        ('{"prompt": [1, 300]}', "prompt"),
        ('{"prompt": [-1], "echo": true}', "prompt"),
        ('{"prompt": ["x", "x"], "n": 100}', "n"),
        ('{"prompt": "x", "max_tokens": 1e30}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": 1000000000000000000000000000000}', "max_tokens"),
        ('{"prompt": "x", "stream_options": {"include_usage": true}}', "stream_options"),
        ('{"prompt": "x", "echo": true, "logprobs": 21}', "logprobs"),
        ('{"prompt": "x", "echo": true, "max_tokens": -1}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "x", "prompt_logprobs": -1}', "prompt_logprobs"),
        (f'{{"prompt": {[[5] * 500] * 50}, "prompt_logprobs": 20}}', "prompt_logprobs"),
        ('{"prompt": "x", "prompt_logprobs": 1, "stream": true}', "prompt_logprobs"),
        ('{"prompt": "x", "temperature": 1e400}', None),
        ('{"prompt": "x", "temperature": Infinity}', None),
    ]
    headers = {"content-type": "application/json"}
    for body, param in cases:
        answer = await http.post("/v1/completions", content=body.encode(), headers=headers)
        assert _error(answer, 400, "invalid_request")["param"] == param, body


async def test_template_that_refuses_is_a_400(http: httpx.AsyncClient) -> None:
    body = CHAT | {"chat_template_kwargs": {"messages": []}}
    answer = await http.post("/v1/chat/completions", json=body)
    assert _error(answer, 400, "invalid_request")["param"] == "chat_template_kwargs"


async def test_request_id_is_echoed_if_it_is_fit(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/nope"):
        answer = await http.get(path, headers={"x-request-id": "abc-1"})
        assert answer.headers["x-request-id"] == "abc-1"
    for unfit in ("x" * 129, "a\tb"):
        answer = await http.get("/health", headers={"x-request-id": unfit})
        assert answer.headers["x-request-id"] not in ("", unfit)


async def test_repeated_request_id_still_makes_unique_sequences(
    http: httpx.AsyncClient, served: Served
) -> None:
    headers = {"x-request-id": "same"}
    await asyncio.gather(
        *(http.post("/v1/chat/completions", json=CHAT, headers=headers) for _ in range(3))
    )
    assert len({request.request_id for request in served.generator.requests}) == 3


async def test_timeout_header_out_of_range(http: httpx.AsyncClient) -> None:
    for value in ("0", "-1", "nan", "inf", "soon", "1e9", ""):
        answer = await http.post(
            "/v1/chat/completions", json=CHAT, headers={"x-request-timeout": value}
        )
        assert _error(answer, 400, "invalid_request")["param"] == "x-request-timeout"


async def test_deadline_comes_from_the_header_or_the_settings(
    http: httpx.AsyncClient, served: Served
) -> None:
    await http.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout": "2.5"})
    await http.post("/v1/chat/completions", json=CHAT)
    given_s, default_s = (r.deadline - r.received_at for r in served.generator.requests)
    assert given_s == pytest.approx(2.5)
    assert default_s == pytest.approx(600)


async def test_fleet_that_misses_the_deadline_is_cut_off() -> None:
    generator = ScriptedGenerator(lambda _: Script(turns=[[100], Gate()]))
    grace = ApiSettings(deadline_grace_s=0.05)
    async with serve(generator, settings=grace) as served, client(served) as http:
        headers = {"x-request-timeout": "0.05"}
        answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        _error(answer, 504, "deadline_exceeded")
        streamed = await http.post(
            "/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers
        )
        assert streamed.status_code == 200
        assert '"deadline_exceeded"' in streamed.text.strip().splitlines()[-1]
        assert (generator.running, generator.left) == (0, 2)


async def test_refusal_by_the_fleet_keeps_its_status(
    http: httpx.AsyncClient, served: Served
) -> None:
    refusals: list[tuple[Exception, int]] = [
        (OverloadedError("full", retry_after_s=2.1), 429),
        (UnavailableError("nobody"), 503),
        (WorkerLostError("gone"), 502),
        (ZeroDivisionError("ours"), 500),
    ]
    for error, status in refusals:
        served.generator.script = lambda _, error=error: Script(refuse=error)  # type: ignore[misc]
        code = error.code if isinstance(error, DiptychError) else "internal"
        for stream in (False, True):
            answer = await http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert "ours" not in _error(answer, status, code)["message"]
            assert answer.headers.get("retry-after") == ("3" if status == 429 else None)
        assert served.metric("diptych_router_requests_total", api="chat", outcome=code) == 2


@pytest.mark.parametrize("n", [1, 3])
async def test_failure_before_the_first_token_of_a_stream_keeps_its_status(
    http: httpx.AsyncClient, served: Served, n: int
) -> None:
    served.generator.script = lambda _: Script(turns=[WorkerLostError("gone")])
    answer = await http.post("/v1/chat/completions", json=CHAT | {"stream": True, "n": n})
    _error(answer, 502, "worker_lost")
    assert served.generator.running == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_failure_in_a_stream_is_one_error_event_at_its_end(served: Served, n: int) -> None:
    served.generator.script = lambda request: (
        Script(turns=[[100], [101], WorkerLostError("gone")])
        if request.request_id.endswith("-0")
        else Script(turns=[[102], Gate()])
    )
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as api:
        stream = await api.chat.completions.create(**CHAT, n=n, stream=True)
        with pytest.raises(openai.APIError, match="gone"):
            async for _ in stream:
                pass
    async with client(served) as http:
        answer = await http.post("/v1/chat/completions", json=CHAT | {"n": n, "stream": True})
    lines = [line for line in answer.text.splitlines() if line]
    assert [i for i, line in enumerate(lines) if '"error"' in line] == [len(lines) - 1]
    assert "[DONE]" not in answer.text
    assert served.generator.running == 0


async def test_more_requests_than_the_router_takes() -> None:
    gate = Gate()
    generator = ScriptedGenerator(lambda _: Script(turns=[gate, [100]]))
    async with (
        serve(generator, settings=ApiSettings(max_in_flight=1)) as served,
        client(served) as http,
    ):
        first = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
        await until(lambda: generator.running == 1)
        refused = await http.post("/v1/chat/completions", json=CHAT)
        _error(refused, 429, "overloaded")
        gate.open()
        assert (await first).status_code == 200
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.booleans(),
    st.dictionaries(
        st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields})),
        ANYTHING,
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_json_makes_a_500(chat: bool, fields: dict[str, Any]) -> None:
    text = byte_text()

    async def post() -> httpx.Response:
        app = create_app(
            generator=ScriptedGenerator(lambda _: says("ok")),
            fleet=NoFleet(),
            facts={},
            text=text,
            settings=ApiSettings(),
            observed=ScriptedView(),
            registry=CollectorRegistry(),
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as http:
            base = {"messages": CHAT["messages"]} if chat else {"prompt": "x"}
            path = "/v1/chat/completions" if chat else "/v1/completions"
            headers = {"content-type": "application/json"}
            content = json.dumps(base | fields).encode()
            return await http.post(path, content=content, headers=headers)

    assert asyncio.run(post()).status_code in (200, 400, 404)


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"messages": 1}, {"model": "other"}])
async def test_an_answer_leaves_nothing_to_the_garbage_collector(
    served: Served, body: dict[str, Any]
) -> None:
    """What it would hold until then may be megabytes, and the collector counts objects."""
    gc.collect()
    gc.disable()
    try:
        async with client(served) as http:
            await http.post("/v1/chat/completions", json=CHAT | body)
        await until(lambda: not any(type(each) is Exchange for each in gc.get_objects()))
    finally:
        gc.enable()
