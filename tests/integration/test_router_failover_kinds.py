"""Every kind of request over workers that die after each single token: no answer changes.

Real dispatch, real links and the real API; the workers are scripted, so that each token has a known
place. Prompts name their kind, which is how a worker knows what to say.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from router.api.settings import ApiSettings
from router.app import create_app
from router.dispatch import Dispatcher
from router.text.loading import text_processor
from router.text.tools.formats import FORMATS
from rpc.v1 import worker_pb2
from tests.integration.router_api.test_tools import CALL, PARAMETERS, TEMPLATE, TOOLS
from tests.support.answers import answer_of, differences
from tests.support.fake_worker import FakeWorker, fake_workers, until
from tests.support.router_api import EOS, SPECIALS, NoFleet, ScriptedView, byte_tokenizer
from tests.support.router_fleet import ready_workers, router_on

TOKENIZER = byte_tokenizer(
    extra=("<tool_call>\n", "</tool_call>", '{"name": "', '", "arguments": {"', "weather", "city")
)
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
STEERED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.1,
    "logit_bias": {"70": 1.5},
    "min_tokens": 3,
}
MESSAGE = "chat"
Kind = tuple[str, dict[str, Any], str]
"""Path, body, and what the model says."""
KINDS: dict[str, Kind] = {
    "greedy": ("completions", {"temperature": 0, "stream": True}, "Größe 日本 of the sea"),
    "seeded": (MESSAGE, {**SAMPLED, "seed": 7, "stream": True}, "a seeded answer"),
    "unseeded": (MESSAGE, {**SAMPLED, "n": 2}, "no seed was given"),
    "steered": ("completions", {**STEERED, "seed": 1, "stream": True}, "penalties, bias"),
    "tools": (MESSAGE, {"tools": TOOLS, "stream": True}, f"Sure.{CALL}"),
    "named": (
        MESSAGE,
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        '{"city": "Paris"}',
    ),
    "structured": (
        MESSAGE,
        {"response_format": {"type": "json_object"}, "stream": True},
        '{"sun": [1, 2, 3]}',
    ),
    "logprobs": ("completions", {"logprobs": 2, "n": 2, "stream": True}, "logs"),
    "chat logprobs": (MESSAGE, {"logprobs": True, "top_logprobs": 3}, "Größe"),
    "echo": ("completions", {"echo": True, "logprobs": 1}, "and its prompt"),
    "stop": ("completions", {"stop": ["e st", "op he"], "stream": True}, "never say stop here"),
    "stop id": ("completions", {"stop_token_ids": [3 + ord("!")], "stream": True}, "halt! no"),
    "cut": ("completions", {"max_tokens": 5, "stream": True}, "longer than that"),
    "reasoning": (MESSAGE, {"stream": True}, "<think>hm, well</think>So it is."),
    "responses": ("responses", {"tools": [WEATHER], "stream": True}, f"<think>a</think>b{CALL}"),
    "native": ("generate", {"stream": True}, "the native form"),
    "native batch": ("generate", {"return_logprob": True}, "told at once"),
}


def said_by(kind: str) -> list[int]:
    return [*TOKENIZER.encode(KINDS[kind][2]).ids, EOS]


def kind_of(submit: worker_pb2.Submit) -> str:
    prompt = TOKENIZER.decode(list(submit.prompt_ids))
    found = re.search(r"#([a-z ]+)#", prompt)
    assert found is not None, prompt
    return found[1]


def request_of(kind: str) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    path, fields, _ = KINDS[kind]
    text = f"#{kind}#"
    base: dict[str, Any] = {"model": "fake", "max_tokens": 200, **fields}
    if fields.get("stream") and path in ("completions", MESSAGE):
        base["stream_options"] = {"include_usage": True}
    if path == MESSAGE:
        return "/v1/chat/completions", {**base, "messages": [{"role": "user", "content": text}]}
    if path == "completions":
        return "/v1/completions", {**base, "prompt": text, "return_token_ids": True}
    if path == "responses":
        return "/v1/responses", {"model": "fake", "input": text, **fields}
    params = {"temperature": 0.5, "max_new_tokens": 200}
    return "/generate", {"text": text, "sampling_params": params, **fields}


@asynccontextmanager
async def api_on(dispatcher: Dispatcher) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the router's application, in this process."""
    app = create_app(
        generator=dispatcher,
        fleet=NoFleet(),
        facts={},
        text=text_processor(
            TOKENIZER,
            TEMPLATE,
            {"eos_token": SPECIALS[EOS]},
            {},
            tool_format=FORMATS["hermes"],
            reasons=True,
        ),
        settings=ApiSettings(),
        observed=ScriptedView(),
        registry=CollectorRegistry(),
    )
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


async def ask(client: httpx.AsyncClient, kind: str) -> Any:
    path, body = request_of(kind)
    response = await client.post(path, json=body, timeout=60)
    assert response.status_code == 200, f"{kind}: {response.text}"
    return answer_of(response.text)


async def ask_all(client: httpx.AsyncClient) -> dict[str, Any]:
    answers = await asyncio.gather(*(ask(client, kind) for kind in KINDS))
    return dict(zip(KINDS, answers, strict=True))


def check_resumed(workers: Sequence[FakeWorker]) -> dict[str, set[int]]:
    """Whatever was placed again is the request as it was, with the tokens that came of it so far.

    Returns:
        By kind, after how many tokens it was placed.
    """
    placed_at: dict[str, set[int]] = {kind: set() for kind in KINDS}
    first: dict[str, worker_pb2.Submit] = {}
    for submit in sorted((s for w in workers for s in w.submits), key=lambda s: s.attempt):
        original = first.setdefault(submit.request_id, submit)
        assert submit.prompt_ids == original.prompt_ids
        assert list(submit.output_ids) == said_by(kind_of(submit))[: len(submit.output_ids)]
        sampling = worker_pb2.SamplingParams()
        sampling.CopyFrom(submit.sampling)
        if submit.output_ids and original.sampling.HasField("prompt_logprobs"):
            sampling.prompt_logprobs = original.sampling.prompt_logprobs
        assert sampling == original.sampling, "seed and all, given or not"
        placed_at[kind_of(submit)].add(len(submit.output_ids))
    return placed_at


@pytest.mark.parametrize("prefill", [0, 1])
async def test_workers_die_after_every_token_of_every_kind(prefill: int) -> None:
    """At the first token, inside a character, a stop string, a call: each place is one of these.

    Whoever generates dies each time, every other time whoever computes prompts does too.
    """
    registry = CollectorRegistry()
    async with (
        fake_workers(prefill=prefill, decode=2) as workers,
        router_on(
            workers, registry=registry, max_attempts=1000, retry_backoff_s=0.001
        ) as dispatcher,
        api_on(dispatcher) as client,
    ):
        for worker in workers:
            worker.says = lambda submit: said_by(kind_of(submit))
        calm = await ask_all(client)
        assert registry.get_sample_value("diptych_router_retries_total") is None
        for worker in workers:
            worker.running = False
            worker.submits.clear()
        running = asyncio.create_task(ask_all(client))
        kills = 0

        def generating() -> list[FakeWorker]:
            """Where requests are generated, once all open ones are and all workers are back."""
            at = [w for w in workers for each in w.sequences if each.phase != "export"]
            open_ones = sum(timeline.ended_at is None for timeline in dispatcher.recent(100))
            whole = ready_workers(registry) == len(workers)
            return list({w.port: w for w in at}.values()) if whole and len(at) == open_ones else []

        while True:
            await until(lambda: running.done() or generating())
            if running.done():
                break
            dying = generating()
            for worker in workers:
                worker.prompt_steps = 2 if kills < 3 else 0
                worker.step()
            for worker in workers if kills % 2 else dying:
                worker.break_streams()
            kills += 1
        assert not list(differences(calm, await running, 0))
        resumed = check_resumed(workers)
        assert all(resumed[kind] == set(range(max(resumed[kind]) + 1)) for kind in KINDS)
        assert max(resumed["greedy"]) == len(said_by("greedy")) - 1
        await until(lambda: not any(worker.busy for worker in workers))
