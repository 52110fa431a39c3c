"""The native API: /generate, and the verbs beside it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from core.finish import FinishReason
from core.sampling import StructuredOutput
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

TEXT = "hello wörld"
IDS = byte_tokenizer().encode(TEXT).ids


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve(ScriptedGenerator(lambda _: says(TEXT, cached_tokens=3))) as running:
        yield running


async def generate(http: httpx.AsyncClient, **body: Any) -> Any:
    answer = await http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_one_prompt_of_text_or_ids(http: httpx.AsyncClient, served: Served) -> None:
    ids = byte_tokenizer().encode("ab").ids
    sampling = {
        "regex": "a+",
        "max_new_tokens": 50,
        "temperature": 0,
        "sampling_seed": 3,
        "top_k": 5,
    }
    for prompt in ({"text": "ab"}, {"input_ids": ids}):
        answer = await generate(http, **prompt, sampling_params=sampling, rid="mine")
        assert answer["text"] == TEXT
        assert answer["output_ids"] == [*IDS, EOS]
        assert answer["meta_info"] == {
            "id": "mine",
            "model": "tiny",
            "finish_reason": {"type": "stop", "matched": EOS},
            "prompt_tokens": len(ids),
            "completion_tokens": len(IDS) + 1,
            "cached_tokens": 3,
        }
        request = served.generator.requests[-1]
        assert list(request.prompt_ids) == ids
        assert (request.sampling.max_tokens, request.sampling.top_k) == (50, 5)
        assert (request.sampling.temperature, request.sampling.seed) == (0, 3)
        assert request.sampling.structured == StructuredOutput(kind="regex", definition="a+")


async def test_batch_answers_in_order(http: httpx.AsyncClient, served: Served) -> None:
    served.generator.script = lambda request: says(byte_tokenizer().decode(request.prompt_ids))
    sampling = {"n": 2, "max_new_tokens": 9}
    answers = await generate(
        http, text=["ab", "hello"], sampling_params=sampling, rid=["x", "y"], return_logprob=True
    )
    assert [answer["text"] for answer in answers] == ["ab", "ab", "hello", "hello"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "x", "y", "y"]
    for answer in answers:
        logprobs = answer["meta_info"]["output_token_logprobs"]
        assert [entry[1] for entry in logprobs] == answer["output_ids"]
    assert len(await generate(http, input_ids=[[65], [66]])) == 2


async def test_prompts_of_a_batch_can_have_settings_of_their_own(
    http: httpx.AsyncClient, served: Served
) -> None:
    sampling = [{"max_new_tokens": 7, "stop": " w"}, {"max_new_tokens": 9, "temperature": 0}]
    answers = await generate(http, text=["a", "b"], sampling_params=sampling)
    assert [answer["text"] for answer in answers] == ["hello", TEXT]
    asked = [request.sampling for request in served.generator.requests]
    assert [(each.max_tokens, each.temperature) for each in asked] == [(7, 1.0), (9, 0.0)]


async def test_stream_repeats_the_text_so_far(http: httpx.AsyncClient) -> None:
    for batch in (False, True):
        answer = await http.post(
            "/generate", json={"text": ["a"] if batch else "a", "stream": True}
        )
        lines = [line[6:] for line in answer.text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
        texts = [event["text"] for event in events]
        assert texts[-1] == TEXT and texts == sorted(texts, key=len) and len(set(texts)) > 5
        assert events[-1]["output_ids"] == [*IDS, EOS]
        finishes = [event["meta_info"]["finish_reason"] for event in events]
        assert finishes[-1]["type"] == "stop" and not any(finishes[:-1])
        assert ("index" in events[0]) == batch


async def test_length_and_logprobs(http: httpx.AsyncClient, served: Served) -> None:
    served.generator.script = lambda _: Script(turns=[[100]], reason=FinishReason.LENGTH)
    answer = await generate(http, text="a", return_logprob=True, top_logprobs_num=2)
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 1}
    assert meta["output_token_logprobs"] == [[-0.5, 100, None]]
    assert [entry[1] for entry in meta["output_top_logprobs"][0]] == [100, 101]
    assert served.generator.requests[-1].sampling.max_tokens == 128


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("by", ["rid", "x-request-id", "all"])
async def test_abort_ends_a_request_with_what_it_has(
    http: httpx.AsyncClient, served: Served, path: str, by: str
) -> None:
    served.generator.script = lambda _: Script(turns=[IDS, Gate()])
    body = {
        "/generate": {"text": "a"},
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }[path]
    running = asyncio.create_task(
        http.post(path, json=body | {"rid": "mine"}, headers={"x-request-id": "header"})
    )
    await until(lambda: served.generator.running == 1)
    missed = await http.post("/abort_request", json={"rid": "other"})
    assert missed.json() == {"success": True, "aborted": 0}
    wanted: dict[str, Any] = {
        "rid": {"rid": "mine"},
        "x-request-id": {"rid": ["header"]},
        "all": {"abort_all": True},
    }[by]
    aborted = await http.post("/abort_request", json=wanted)
    assert aborted.json() == {"success": True, "aborted": 1}
    answer = (await running).json()
    if path == "/generate":
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert answer["text"] == TEXT
    else:
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert choice.get("text", choice.get("message", {}).get("content")) == TEXT
    assert served.generator.running == 0


async def test_one_prompt_of_a_batch_is_aborted_alone(
    http: httpx.AsyncClient, served: Served
) -> None:
    gate = Gate()
    served.generator.script = lambda _: Script(turns=[gate, IDS], reason=FinishReason.LENGTH)
    running = asyncio.create_task(generate(http, text=["a", "b"], rid=["x", "y"]))
    await until(lambda: served.generator.running == 2)
    await http.post("/abort_request", json={"rid": "y"})
    gate.open()
    kinds = [answer["meta_info"]["finish_reason"]["type"] for answer in await running]
    assert kinds == ["length", "abort"]


async def test_what_runs_here(http: httpx.AsyncClient) -> None:
    model = (await http.get("/get_model_info")).json()
    assert (model["model_path"], model["max_model_len"]) == ("tiny", 512)
    server = (await http.get("/get_server_info")).json()
    assert server == {
        "router": {"model": "tiny"},
        "workers": [{"address": "nowhere:1", "state": "ready"}],
    }
    flushed = (await http.post("/flush_cache")).json()
    assert flushed == {"success": True, "workers": [{"address": "nowhere:1", "freed_blocks": 0}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": [1]}, "text"),
        ({"input_ids": "a"}, "input_ids"),
        ({"text": ["a", "b"], "rid": "x"}, "rid"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"temperature": "x"}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"stop": 5}}, "sampling_params.stop"),
        ({"text": "a", "sampling_params": {"stop_regex": "a"}}, "sampling_params.stop_regex"),
        ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"n": 2}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"x": 2}]}, "sampling_params[1].x"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len"),
        (
            {"text": "ab", "return_logprob": True, "logprob_start_len": 0, "stream": True},
            "logprob_start_len",
        ),
    ],
)
async def test_wrong_fields_are_named(
    http: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    answer = await http.post("/generate", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
