"""Log probabilities of the prompt in every shape that asks for them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from core.finish import FinishReason
from tests.support.router_api import (
    EOS,
    Gate,
    Script,
    ScriptedGenerator,
    Served,
    byte_tokenizer,
    says,
    serve,
    until,
)

PROMPT = "<|im_start|>é hello world"
IDS = byte_tokenizer().encode(PROMPT).ids
POSITIONS = range(1, len(IDS))


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve(ScriptedGenerator(lambda _: says("ok"))) as running:
        yield running


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_echo_shows_prompt_and_output_aligned(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    answer = await api.completions.create(
        model="tiny", prompt=PROMPT, echo=True, logprobs=2, n=2, max_tokens=9
    )
    for choice in answer.choices:
        found = choice.logprobs
        assert found is not None and found.tokens and found.text_offset and found.top_logprobs
        assert choice.text == PROMPT + "ok"
        assert found.token_logprobs == [None, *(-p for p in POSITIONS), -0.5, -0.5, -0.5]
        assert len(found.tokens) == len(found.text_offset) == len(found.top_logprobs)
        assert found.top_logprobs[0] is None
        assert {len(top) for top in found.top_logprobs[1:]} == {2}
        for token, offset in zip(found.tokens[:-1], found.text_offset[:-1], strict=True):
            assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
        letter = [o for o, t in zip(found.text_offset, found.tokens, strict=True) if "bytes:" in t]
        assert letter == [len("<|im_start|>")] * 2
    asked = [request.sampling.prompt_logprobs for request in served.generator.requests]
    assert sorted(asked, key=str) == [2, None], "one of two choices is enough"


async def test_stream_of_an_echo_begins_with_the_prompt(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    gate = Gate()
    scripts = iter([Script([gate, [100]], FinishReason.LENGTH), says("ok")])
    served.generator.script = lambda _: next(scripts)
    asked = asyncio.create_task(
        api.completions.create(
            model="tiny", prompt=PROMPT, echo=True, logprobs=0, n=2, max_tokens=9, stream=True
        )
    )
    await until(lambda: len(served.generator.requests) == 2)
    gate.open()
    chunks = [chunk async for chunk in await asked]
    for index in (0, 1):
        choices = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert choices[0].text == PROMPT and choices[0].logprobs is not None
        assert choices[0].logprobs.token_logprobs == [None, *(-p for p in POSITIONS)]
        after = [choice.logprobs.token_logprobs for choice in choices[1:] if choice.logprobs]
        assert after and all(values == [-0.5] for values in after)


@pytest.mark.parametrize("stream", [False, True])
async def test_scoring_alone_generates_nothing(
    api: openai.AsyncOpenAI, served: Served, stream: bool
) -> None:
    answer: Any = await api.completions.create(
        model="tiny", prompt=[IDS, IDS[1:]], echo=True, logprobs=1, max_tokens=0, stream=stream
    )
    parts = [answer] if not stream else [chunk async for chunk in answer]
    choices = [choice for part in parts for choice in part.choices]
    told = [choice for choice in choices if choice.logprobs is not None]
    assert [len(choice.logprobs.tokens) for choice in told] == [len(IDS), len(IDS) - 1]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"] * 2
    assert "ok" not in "".join(choice.text for choice in choices)
    assert served.metric("diptych_router_generation_tokens_total") == 0
    if not stream:
        assert answer.usage.completion_tokens == 0


async def test_prompt_logprobs_by_token_id(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "ab"}]
    completion = await post(http, "/v1/completions", prompt=[5, 101, 7], prompt_logprobs=2)
    chat = await post(
        http,
        "/v1/chat/completions",
        messages=messages,
        prompt_logprobs=0,
        return_token_ids=True,
        n=2,
    )
    first, second, third = completion["choices"][0]["prompt_logprobs"]
    assert first is None
    assert {token_id: (e["logprob"], e["rank"]) for token_id, e in second.items()} == {
        "101": (-1.0, 1),
        "100": (-0.5, 1),
    }
    assert list(third) == ["7", "100", "101"]
    assert third["7"] == {"logprob": -2.0, "rank": 2, "decoded_token": byte_tokenizer().decode([7])}
    ids = chat["choices"][0]["prompt_token_ids"]
    assert [entry and list(entry) for entry in chat["prompt_logprobs"]] == [
        None,
        *([str(token_id)] for token_id in ids[1:]),
    ]
    assert "prompt_logprobs" not in chat["choices"][0]


async def test_generate_starts_where_it_was_told(http: httpx.AsyncClient) -> None:
    answer = await post(
        http,
        "/generate",
        input_ids=[[5, 6, 7], [8, 9]],
        return_logprob=True,
        logprob_start_len=1,
        top_logprobs_num=1,
    )
    metas = [one["meta_info"] for one in answer]
    assert metas[0]["input_token_logprobs"] == [[None, 6, None], [-2.0, 7, None]]
    assert metas[0]["input_top_logprobs"] == [None, [[-0.5, 100, None]]]
    assert metas[1]["input_token_logprobs"] == [[None, 9, None]]
    assert metas[0]["output_token_logprobs"][-1][1] == EOS


async def test_an_abort_before_the_first_token_leaves_them_out(
    http: httpx.AsyncClient, served: Served
) -> None:
    served.generator.script = lambda _: Script([Gate(), [100]])
    asked = asyncio.create_task(
        post(http, "/v1/completions", prompt=[5, 6], prompt_logprobs=0, n=2, rid="x")
    )
    await until(lambda: served.generator.running == 2)
    await post(http, "/abort_request", rid="x")
    answer = await asked
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [None, None]
