"""Clients that leave, silences, and what the router says about itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from core.finish import FinishReason
from router.admission import Priority
from router.api.settings import ApiSettings
from tests.support.router_api import (
    Gate,
    Script,
    ScriptedGenerator,
    Served,
    client,
    raw_connection,
    says,
    serve,
    until,
)

CHAT: Any = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve(ScriptedGenerator()) as running:
        yield running


def _left(served: Served, phase: str) -> float:
    return served.metric("diptych_router_client_disconnects_total", api="chat", phase=phase)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_before_any_token_frees_the_fleet(
    served: Served, stream: bool, n: int
) -> None:
    served.generator.script = lambda _: Script(turns=[Gate()])
    async with client(served) as http:
        body = CHAT | {"stream": stream, "n": n}
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await until(lambda: served.generator.running == n)
        asking.cancel()
        await until(lambda: served.generator.left == n)
    assert served.generator.running == 0
    await until(lambda: _left(served, "waiting") == 1)
    await until(lambda: not served.metric("diptych_router_requests_in_flight", api="chat"))


@pytest.mark.parametrize("n", [1, 3])
async def test_client_that_leaves_mid_stream_frees_the_fleet(served: Served, n: int) -> None:
    served.generator.script = lambda _: Script(turns=[[100], [101], Gate(), [102]])
    async with client(served) as http:
        body = CHAT | {"stream": True, "n": n}
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if '"content":"' in line:
                    break
            assert served.generator.running == n
        await until(lambda: served.generator.left == n)
    assert served.generator.running == 0
    await until(lambda: _left(served, "streaming") == 1)


async def test_client_that_leaves_while_sending_its_body_is_counted(served: Served) -> None:
    async with raw_connection(served) as (_, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        in_flight = "diptych_router_requests_in_flight"
        await until(lambda: served.metric(in_flight, api="chat") == 1)
    await until(lambda: _left(served, "body") == 1)
    assert served.generator.requests == []


async def test_client_that_does_not_read_is_cut_off_after_its_deadline() -> None:
    big = [100] * 100_000

    def flood(_: object) -> Script:
        return Script(turns=[big] * 400)

    generator = ScriptedGenerator(flood)
    quick = ApiSettings(deadline_grace_s=0.1)
    async with (
        serve(generator, settings=quick) as served,
        raw_connection(served) as (_, writer),
    ):
        body = json.dumps(CHAT | {"stream": True}).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-request-timeout: 1\r\n"
            b"content-type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await until(lambda: generator.left == 1)
        outcome = {"api": "chat", "outcome": "deadline_exceeded"}
        await until(lambda: served.metric("diptych_router_requests_total", **outcome) == 1)


async def test_silent_stream_gets_comments_and_then_its_tokens() -> None:
    gate = Gate()
    generator = ScriptedGenerator(lambda _: Script(turns=[gate, [100]], reason=FinishReason.LENGTH))
    often = ApiSettings(keep_alive_s=0.02)
    async with serve(generator, settings=often) as served, client(served) as http:
        body = CHAT | {"stream": True}
        comments, data = 0, []
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            async for line in answer.aiter_lines():
                comments += line == ": keep-alive"
                if comments == 2:
                    gate.open()
                if line.startswith("data: "):
                    data.append(line)
        assert comments >= 2
        assert data[-1] == "data: [DONE]"
        assert len(data) == 4


async def test_tokens_are_sent_as_they_come(served: Served) -> None:
    gates = [Gate(), Gate()]
    served.generator.script = lambda _: Script(
        turns=[[100], gates[0], [101], gates[1]], reason=FinishReason.LENGTH
    )
    async with client(served) as http:
        body = {"prompt": "x", "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            for gate in gates:
                line = await anext(lines)
                assert json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                assert await anext(lines) == ""
                gate.open()


async def test_health_lives_and_ready_tells_the_truth(served: Served) -> None:
    async with client(served) as http:
        assert (await http.get("/ready")).status_code == 200
        served.generator.ready = False
        unready = await http.get("/ready")
        assert unready.status_code == 503
        assert unready.json()["error"]["code"] == "unavailable"
        served.generator.served = None
        assert "No worker has attached" in (await http.get("/ready")).text
        assert (await http.get("/health")).status_code == 200
        for path, body in (("/v1/models", None), ("/v1/chat/completions", CHAT)):
            answer = await http.request("POST" if body else "GET", path, json=body)
            assert answer.status_code == 503


async def test_metrics_count_what_happened(served: Served) -> None:
    served.generator.script = lambda _: says("abcd")
    async with client(served) as http:
        await http.post("/v1/chat/completions", json=CHAT)
        await http.post("/v1/chat/completions", json=CHAT | {"n": 0})
        text = (await http.get("/metrics")).text
    made = served.metric("diptych_router_generation_tokens_total")
    assert f"diptych_router_generation_tokens_total {made}" in text
    for name, labels, value in (
        ("requests_total", {"outcome": "ok"}, 1),
        ("requests_total", {"outcome": "invalid_request"}, 1),
        ("time_to_first_token_seconds_count", {}, 1),
        ("inter_token_latency_seconds_count", {}, made - 1),
        ("request_duration_seconds_count", {}, 2),
        ("requests_in_flight", {}, 0),
    ):
        assert served.metric(f"diptych_router_{name}", api="chat", **labels) == value, name
    prompt_tokens = len(served.generator.requests[0].prompt_ids)
    assert served.metric("diptych_router_prompt_tokens_total") == prompt_tokens


@pytest.mark.parametrize("what", ["timeline", "explain"])
async def test_what_is_known_of_a_request_is_found_by_any_of_its_names(
    served: Served, what: str
) -> None:
    served.generator.script = lambda _: says("x")
    async with client(served) as http:
        answer = await http.post(
            "/v1/chat/completions", json=CHAT | {"n": 2}, headers={"x-request-id": "a/b"}
        )
        parts = [request.request_id for request in served.generator.requests]
        served.generator.timelines = {part: {"request_id": part} for part in parts}
        found = [{"request_id": part} for part in parts]
        for name in ("a/b", answer.json()["id"]):
            about = (await http.get(f"/v1/requests/{name}/{what}")).json()
            assert about["sequences"] == found
        one = (await http.get(f"/v1/requests/{parts[1]}/{what}")).json()
        assert one["sequences"] == found[1:]
        assert (await http.get(f"/v1/requests/none/{what}")).status_code == 404


async def test_caller_and_priority_reach_the_queue(served: Served) -> None:
    served.generator.script = lambda _: says("x")
    async with client(served) as http:
        headers = {"x-request-priority": "low"}
        await http.post("/v1/chat/completions", json=CHAT | {"user": "alice"}, headers=headers)
    request = served.generator.requests[0]
    assert (request.key, request.priority) == ("user alice", Priority.LOW)


async def test_streams_do_not_mix() -> None:
    generator = ScriptedGenerator(
        lambda request: says("".join(chr(97 + t % 26) for t in request.prompt_ids) * 5)
    )
    async with serve(generator) as served, client(served) as http:

        async def ask(i: int) -> tuple[int, str]:
            body = {"prompt": [10 + i, 40 + i], "stream": True, "max_tokens": 99}
            answer: httpx.Response = await http.post("/v1/completions", json=body)
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            return i, "".join(json.loads(event)["choices"][0]["text"] for event in events)

        for i, text in await asyncio.gather(*(ask(i) for i in range(26))):
            assert text == f"{chr(97 + (10 + i) % 26)}{chr(97 + (40 + i) % 26)}" * 5
