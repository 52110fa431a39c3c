"""Keys at the HTTP port: who may do what, how often, and what they see of each other."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from router.access.door import Door
from router.admission import Priority
from tests.support.api_keys import KeyRing
from tests.support.router_api import (
    Gate,
    Script,
    ScriptedGenerator,
    Served,
    client,
    says,
    serve,
    until,
)

CHAT: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
RING = KeyRing(
    alice={},
    bob={"models": ["other"], "priority": "low"},
    carol={"tenant": "team"},
    dave={"tenant": "team", "priority": "high"},
    root={"admin": True},
)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    generator = ScriptedGenerator(lambda _: says("ok"))
    async with serve(generator, door=Door(RING.keys)) as running:
        yield running


def _error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert answer.headers["x-request-id"]
    return error


OPEN = {"/health", "/ready"}
ADMIN = {"/flush_cache", "/get_server_info", "/v1/requests", "/v1/fleet", "/metrics", "/console"}


async def test_every_path_but_those_of_probes_needs_a_key(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json", headers=RING.bearer("alice"))).json()
    paths = {path: list(methods) for path, methods in document["paths"].items()}
    paths |= {"/openapi.json": ["get"], "/console": ["get"], "/console/main.js": ["get"]}
    assert len(paths) > 25
    for path, methods in paths.items():
        for method in methods:
            send = {"json": {}} if method == "post" else {}
            url = path.replace("{", "").replace("}", "")
            without = await http.request(method, url, **send)
            wrong = await http.request(
                method, url, headers={"authorization": "Bearer dk-wrong"}, **send
            )
            if path in OPEN:
                assert without.status_code == wrong.status_code == 200
                continue
            for answer in (without, wrong):
                error = _error(answer, 401, "invalid_api_key")
                assert error["type"] == "authentication_error"
                assert answer.headers["www-authenticate"]
                assert "dk-wrong" not in answer.text
            ordinary = await http.request(method, url, headers=RING.bearer("alice"), **send)
            admins = path in ADMIN or path.startswith("/console")
            assert (ordinary.status_code == 403) == admins, (path, ordinary.text)
            allowed = await http.request(method, url, headers=RING.bearer("root"), **send)
            assert allowed.status_code not in (401, 403), path


async def test_openai_s_client_sees_its_own_kinds_of_error(served: Served) -> None:
    def api(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)

    async with api(RING.plain["alice"]) as alice, api("sk-nobody") as nobody:
        assert (await alice.chat.completions.create(**CHAT)).choices[0].message.content == "ok"
        with pytest.raises(openai.AuthenticationError):
            await nobody.chat.completions.create(**CHAT)
    async with api(RING.plain["bob"]) as bob:
        with pytest.raises(openai.PermissionDeniedError):
            await bob.chat.completions.create(**CHAT)
        assert [model.id async for model in bob.models.list()] == []


async def test_a_model_that_is_not_for_a_key(http: httpx.AsyncClient) -> None:
    bob = RING.bearer("bob")
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "x"}),
        ("/generate", {"text": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ):
        error = _error(await http.post(path, json=body, headers=bob), 403, "permission_denied")
        assert error["type"] == "permission_error"
        assert (error["param"], "tiny" in error["message"]) == ("model", True)
    _error(await http.get("/v1/models/tiny", headers=bob), 403, "permission_denied")


async def test_priority_is_the_key_s_and_can_only_be_lowered(
    http: httpx.AsyncClient, served: Served
) -> None:
    async def post(name: str, **headers: str) -> httpx.Response:
        return await http.post(
            "/v1/chat/completions", json=CHAT, headers=RING.bearer(name) | headers
        )

    await post("dave")
    await post("dave", **{"x-request-priority": "low"})
    await post("alice")
    asked = [(request.key, request.priority) for request in served.generator.requests]
    assert asked == [
        ("tenant team", Priority.HIGH),
        ("tenant team", Priority.LOW),
        ("tenant alice", Priority.NORMAL),
    ]
    error = _error(await post("alice", **{"x-request-priority": "high"}), 403, "permission_denied")
    assert "high" in error["message"]


async def test_limits_answer_429_with_openai_s_headers() -> None:
    ring = KeyRing(few={"requests_per_minute": 2}, small={"tokens_per_minute": 30}, free={})
    clock = [1000.0]
    door = Door(ring.keys, clock=lambda: clock[0])
    async with (
        serve(ScriptedGenerator(lambda _: says("ok")), door=door) as served,
        client(served) as http,
    ):

        async def post(name: str, **fields: object) -> httpx.Response:
            return await http.post(
                "/v1/completions", json={"prompt": "0123456789"} | fields, headers=ring.bearer(name)
            )

        left = [(await post("few")).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
        assert left == ["1", "0"]
        refused = await post("few")
        error = _error(refused, 429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "30"
        assert refused.headers["x-ratelimit-limit-requests"] == "2"
        assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
        clock[0] += 30
        assert (await post("few")).status_code == 200

        # Ten tokens of the prompt, three of the output: "o", "k" and the end.
        answer = await post("small")
        assert answer.json()["usage"]["total_tokens"] == 13
        assert answer.headers["x-ratelimit-remaining-tokens"] == "17"
        streamed = await post("small", stream=True)
        assert streamed.headers["x-ratelimit-remaining-tokens"] in ("7", "6")
        _error(await post("small"), 429, "rate_limit_exceeded")
        for _ in range(5):
            answer = await post("free")
            assert answer.status_code == 200
            assert not any(name.startswith("x-ratelimit") for name in answer.headers)
        assert served.metric("diptych_router_refusals_total", code="rate_limit_exceeded") == 2


async def test_requests_at_once_and_that_they_can_still_be_aborted() -> None:
    ring = KeyRing(one={"max_concurrent": 1})
    gate = Gate()
    generator = ScriptedGenerator(lambda _: Script(turns=[[100], gate, [101]]))
    async with serve(generator, door=Door(ring.keys)) as served, client(served) as http:
        headers = ring.bearer("one")
        first = asyncio.create_task(
            http.post("/v1/chat/completions", json=CHAT | {"rid": "mine"}, headers=headers)
        )
        await until(lambda: generator.running == 1)
        _error(
            await http.post("/v1/chat/completions", json=CHAT, headers=headers),
            429,
            "rate_limit_exceeded",
        )
        await http.post("/abort_request", json={"rid": "mine"}, headers=headers)
        assert (await first).status_code == 200
        gate.open()
        again = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert again.status_code == 200


async def test_what_a_tenant_did_is_for_its_own_eyes(
    http: httpx.AsyncClient, served: Served
) -> None:
    carol = RING.bearer("carol")
    answer = await http.post(
        "/v1/responses", json={"input": "x"}, headers=carol | {"x-request-id": "r1"}
    )
    response_id = answer.json()["id"]
    sequence = f"{response_id}-0"
    served.generator.timelines[sequence] = {"secret": "of carol"}
    paths = [f"/v1/responses/{response_id}"] + [
        f"/v1/requests/{name}/{what}"
        for name in ("r1", response_id, sequence)
        for what in ("timeline", "explain")
    ]
    for path in paths:
        for name in ("carol", "dave", "root"):
            assert (await http.get(path, headers=RING.bearer(name))).status_code == 200, path
        _error(await http.get(path, headers=RING.bearer("alice")), 404, "not_found")
    alice = RING.bearer("alice")
    for answer in (
        await http.delete(f"/v1/responses/{response_id}", headers=alice),
        await http.post(f"/v1/responses/{response_id}/cancel", headers=alice),
        await http.post(
            "/v1/responses", json={"input": "x", "previous_response_id": response_id}, headers=alice
        ),
    ):
        _error(answer, 404, "not_found")
    followed = await http.post(
        "/v1/responses",
        json={"input": "y", "previous_response_id": response_id},
        headers=RING.bearer("dave"),
    )
    assert followed.status_code == 200


async def test_a_tenant_ends_its_own_requests_only() -> None:
    gate = Gate()
    generator = ScriptedGenerator(lambda _: Script(turns=[[100], gate, [101]]))
    async with serve(generator, door=Door(RING.keys)) as served, client(served) as http:

        async def abort(name: str, **body: object) -> httpx.Response:
            return await http.post("/abort_request", json=body, headers=RING.bearer(name))

        running = asyncio.create_task(
            http.post(
                "/v1/chat/completions",
                json=CHAT | {"rid": "job"},
                headers=RING.bearer("carol") | {"x-request-id": "r1"},
            )
        )
        await until(lambda: generator.running == 1)
        (sequence,) = generator.aborted
        for rid in ("job", "r1", sequence, sequence.removesuffix("-0")):
            assert (await abort("alice", rid=rid)).json()["aborted"] == 0
        _error(await abort("alice", abort_all=True), 403, "permission_denied")
        assert generator.running == 1
        assert (await abort("dave", rid=sequence)).json()["aborted"] == 1
        assert (await running).status_code == 200
        assert (await abort("root", abort_all=True)).json() == {"success": True, "aborted": 0}


async def test_the_same_prompt_of_two_tenants_starts_from_two_hashes(
    http: httpx.AsyncClient, served: Served
) -> None:
    for name in ("alice", "carol", "dave"):
        for fields in ({}, {"cache_salt": "s"}, {"extra_key": "s"}):
            body = {"prompt": "x", **fields}
            await http.post("/v1/completions", json=body, headers=RING.bearer(name))
    salts = [request.cache_salt for request in served.generator.requests]
    assert len({*salts[:6]}) == 6
    assert salts[3:6] == salts[6:]
    assert not any("alice" in salt or "team" in salt for salt in salts)
