"""What clients get, through the openai client and a real server."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from core.finish import FinishReason
from router.api.sampling import choice_seed
from router.api.settings import ApiSettings
from router.generation import GenerationRequest
from tests.support.router_api import (
    EOS,
    Script,
    ScriptedGenerator,
    Served,
    byte_tokenizer,
    client,
    says,
    serve,
)

USER: Any = [{"role": "user", "content": "hi"}]
TEXT = "hello wörld 你好 🙂!"
CHAT_IDS = (
    byte_tokenizer()
    .encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    .ids
)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve(ScriptedGenerator(lambda _: says(TEXT, cached_tokens=3))) as running:
        yield running


async def test_chat_has_text_reason_and_true_usage(api: openai.AsyncOpenAI, served: Served) -> None:
    raw = await api.chat.completions.with_raw_response.create(model="tiny", messages=USER)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    made = len(byte_tokenizer().encode(TEXT).ids) + 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(CHAT_IDS)
    assert answer.usage.completion_tokens == made
    assert answer.usage.total_tokens == len(CHAT_IDS) + made
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert raw.headers["x-diptych-mode"] == "disaggregated"
    request = served.generator.requests[0]
    assert list(request.prompt_ids) == CHAT_IDS
    assert request.sampling.max_tokens == 512 - len(CHAT_IDS)
    assert request.received_at <= request.tokenized_at <= request.deadline


async def test_stream_says_the_same_as_the_whole_answer(api: openai.AsyncOpenAI) -> None:
    stream = await api.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == TEXT
    assert all("\ufffd" not in delta for delta in deltas)
    assert len([delta for delta in deltas if delta]) > 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(CHAT_IDS)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_continuous_usage_grows_with_every_chunk(api: openai.AsyncOpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await api.completions.create(
        model="tiny", prompt="x", stream=True, max_tokens=99, stream_options=options
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == len(byte_tokenizer().encode(TEXT).ids) + 1


async def test_choices_are_interleaved_and_have_their_own_seeds(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    served.generator.script = lambda request: says(request.request_id[-1] * 20)
    stream = await api.chat.completions.create(
        model="tiny", messages=USER, n=3, seed=5, stream=True
    )
    texts = {0: "", 1: "", 2: ""}
    order = []
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
    assert texts == {0: "0" * 20, 1: "1" * 20, 2: "2" * 20}
    assert order != sorted(order)
    seeds = [request.sampling.seed for request in served.generator.requests]
    assert seeds == [choice_seed(5, i) for i in range(3)]
    assert len({request.request_id for request in served.generator.requests}) == 3


async def test_several_prompts_times_n_make_ordered_choices(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    answer = await api.completions.create(
        model="tiny", prompt=["ab", "hello"], n=2, echo=True, max_tokens=50
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts == ["ab" + TEXT] * 2 + ["hello" + TEXT] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 6


async def test_prompt_of_ids_runs_as_it_is_and_echoes_its_text(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    ids = byte_tokenizer().encode("hello world").ids
    stream = await api.completions.create(
        model="tiny", prompt=ids, echo=True, stream=True, max_tokens=50
    )
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == "hello world" + TEXT
    assert list(served.generator.requests[0].prompt_ids) == ids


async def test_completion_defaults_to_sixteen_tokens(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    await api.completions.create(model="tiny", prompt="x")
    assert served.generator.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_the_generation_at_once(
    api: openai.AsyncOpenAI, served: Served, stream: bool
) -> None:
    def endless(_: GenerationRequest) -> Script:
        ids = byte_tokenizer(extra=()).encode("one STOP two").ids
        return Script(turns=[[token_id] for token_id in ids * 1000])

    served.generator.script = endless
    fields: Any = {"model": "tiny", "messages": USER, "stop": ["STOP", "never"], "stream": stream}
    answer = await api.chat.completions.create(**fields)
    if stream:
        choices = [chunk.choices[0] async for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        last: Any = choices[-1]
    else:
        last = answer.choices[0]
        text = last.message.content
    assert text == "one "
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")
    assert (served.generator.running, served.generator.left) == (0, 1)
    assert served.metric("diptych_router_generation_tokens_total") == len("one STOP")


async def test_length_is_reported(api: openai.AsyncOpenAI, served: Served) -> None:
    served.generator.script = lambda _: Script(turns=[[100]], reason=FinishReason.LENGTH)
    answer = await api.chat.completions.create(model="tiny", messages=USER, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


async def test_chat_logprobs_stream_one_entry_per_token(
    api: openai.AsyncOpenAI, served: Served
) -> None:
    stream = await api.chat.completions.create(
        model="tiny", messages=USER, logprobs=True, top_logprobs=2, stream=True
    )
    entries = []
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        entries += logprobs.content or [] if logprobs else []
    spelt = b"".join(bytes(entry.bytes or []) for entry in entries[:-1])
    assert spelt.decode() == TEXT
    assert entries[-1].token == "<|im_end|>"
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert served.generator.requests[0].sampling.logprobs == 2


async def test_completion_logprobs_are_aligned(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=1)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None and found.text_offset is not None
    assert len(found.tokens) == len(found.text_offset) == len(found.token_logprobs or ())
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert answer.choices[0].text[offset:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_returned_on_request(api: openai.AsyncOpenAI, stream: bool) -> None:
    answer: Any = await api.chat.completions.create(
        model="tiny", messages=USER, extra_body={"return_token_ids": True}, stream=stream
    )
    choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    ids = [token_id for choice in choices for token_id in getattr(choice, "token_ids", None) or []]
    assert ids == [*byte_tokenizer().encode(TEXT).ids, EOS]
    assert choices[0].prompt_token_ids == CHAT_IDS


async def test_special_tokens_are_shown_on_request(api: openai.AsyncOpenAI, served: Served) -> None:
    served.generator.script = lambda _: Script(turns=[[100, 1, 101]], reason=FinishReason.LENGTH)
    shown = await api.completions.create(
        model="tiny", prompt="x", extra_body={"skip_special_tokens": False}
    )
    hidden = await api.completions.create(model="tiny", prompt="x")
    assert "<|im_start|>" in shown.choices[0].text
    assert shown.choices[0].text.replace("<|im_start|>", "") == hidden.choices[0].text


async def test_final_message_can_be_continued(api: openai.AsyncOpenAI, served: Served) -> None:
    await api.chat.completions.create(
        model="tiny",
        messages=[*USER, {"role": "assistant", "content": "Sure: "}],
        extra_body={"continue_final_message": True},
    )
    text = byte_tokenizer().decode(served.generator.requests[0].prompt_ids)
    assert text.endswith("assistant\nSure: ")


async def test_models_are_listed_under_the_served_name() -> None:
    settings = ApiSettings(served_model_name="org/name")
    async with serve(ScriptedGenerator(), settings=settings) as served, client(served) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["org/name"]
        assert (await http.get("/v1/models/org/name")).json() == listed[0]
        assert listed[0]["max_model_len"] == 512


async def test_tokenize_and_detokenize_are_inverse(served: Served) -> None:
    async with client(served) as http:
        body = {"prompt": TEXT, "return_token_strs": True}
        for prefix in ("", "/v1"):
            found = (await http.post(f"{prefix}/tokenize", json=body)).json()
            assert found["tokens"] == byte_tokenizer().encode(TEXT).ids
            assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
            back = await http.post(f"{prefix}/detokenize", json={"tokens": found["tokens"]})
            assert back.json() == {"prompt": TEXT}
        chat = (await http.post("/tokenize", json={"messages": USER})).json()
        assert chat["tokens"] == CHAT_IDS


async def test_a_megabyte_of_prompt_arrives_whole() -> None:
    # Met elsewhere: Bodies of more than some kilobytes broke on their way.
    ids = [100 + index % 100 for index in range(260_000)]
    generator = ScriptedGenerator(lambda _: says("ok"))
    assert generator.served is not None
    generator.served = replace(generator.served, max_model_len=1_000_000)
    async with serve(generator) as served, client(served) as http:
        body = {"model": "tiny", "prompt": ids, "max_tokens": 4}
        raw = json.dumps(body)
        assert len(raw) > 1 << 20
        answer = (await http.post("/v1/completions", content=raw)).json()
    assert answer["choices"][0]["text"] == "ok"
    (request,) = generator.requests
    assert list(request.prompt_ids) == ids
