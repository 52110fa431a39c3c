"""Function calls and reasoning, as the openai client sees them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from core.finish import FinishReason
from router.text.loading import text_processor
from router.text.tools.formats import FORMATS
from tests.support.router_api import (
    EOS,
    SPECIALS,
    Script,
    ScriptedGenerator,
    Served,
    byte_tokenizer,
    client,
    says,
    serve,
)

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if think %}<think>{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("weather", "time")
]
USER: Any = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@asynccontextmanager
async def served_by(
    text: str, tool_parser: str = "hermes", **script: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, Served]]:
    processor = text_processor(
        byte_tokenizer(),
        TEMPLATE,
        {"eos_token": SPECIALS[EOS]},
        {},
        tool_format=FORMATS.get(tool_parser),
        reasons=True,
    )
    generator = ScriptedGenerator(lambda _: says(text, turn=2, **script))
    async with (
        serve(generator, text=processor) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as api,
    ):
        yield api, served


async def message_of(api: openai.AsyncOpenAI, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """The message and finish reason, put together as clients do."""
    options: Any = {"model": "tiny", "messages": USER, **fields}
    if not stream:
        choice = (await api.chat.completions.create(**options)).choices[0]
        return {
            "content": choice.message.content or "",
            "reasoning": getattr(choice.message, "reasoning_content", ""),
            "calls": [
                (call.function.name, call.function.arguments)
                for call in choice.message.tool_calls or []
            ],
            "finish": choice.finish_reason,
        }
    content = reasoning = ""
    calls: list[list[str]] = []
    finish = None
    async for event in await api.chat.completions.create(stream=True, **options):
        delta = event.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
        finish = event.choices[0].finish_reason or finish
    return {
        "content": content,
        "reasoning": reasoning,
        "calls": [tuple(call) for call in calls],
        "finish": finish,
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tool_parser", "text"),
    [
        ("hermes", f"Let me see.\n{CALL}\n{OTHER}"),
        (
            "llama3",
            'Let me see.<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}; '
            '{"name": "time", "parameters": {}}',
        ),
        (
            "mistral",
            'Let me see.[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, '
            '{"name": "time", "arguments": {}}]',
        ),
    ],
)
async def test_parallel_calls_in_every_format(tool_parser: str, text: str, stream: bool) -> None:
    async with served_by(text, tool_parser) as (api, served):
        assert await message_of(api, stream=stream, tools=TOOLS) == {
            "content": "Let me see.",
            "reasoning": "",
            "calls": [("weather", '{"city": "Paris"}'), ("time", "{}")],
            "finish": "tool_calls",
        }
        prompt = byte_tokenizer().decode(served.generator.requests[0].prompt_ids)
        assert json.dumps(TOOLS) in prompt


@pytest.mark.parametrize("stream", [False, True])
async def test_no_second_call_where_parallel_ones_are_not_wanted(stream: bool) -> None:
    async with served_by(f"{CALL}{OTHER}") as (api, served):
        message = await message_of(api, stream=stream, tools=TOOLS, parallel_tool_calls=False)
        assert message["calls"] == [("weather", '{"city": "Paris"}')]
        assert message["finish"] == "tool_calls"
        made = served.metric("diptych_router_generation_tokens_total")
        assert made < len(byte_tokenizer().encode(CALL + OTHER).ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_looks_like_a_call_is_text_where_there_are_no_tools(stream: bool) -> None:
    async with served_by(CALL) as (api, served):
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            message = await message_of(api, stream=stream, **fields)
            assert (message["content"], message["calls"]) == (CALL, [])
            assert message["finish"] == "stop"
            prompt = byte_tokenizer().decode(served.generator.requests[-1].prompt_ids)
            assert "weather" not in prompt


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_was_cut_off_says_length(stream: bool) -> None:
    async with served_by(CALL[:60], reason=FinishReason.LENGTH) as (api, _):
        message = await message_of(api, stream=stream, tools=TOOLS)
        assert message["finish"] == "length"
        assert (message["content"], len(message["calls"])) == ("", 1)
        assert '{"city": "Paris"}'.startswith(message["calls"][0][1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "named"])
async def test_forced_calls_are_constrained(choice: str, stream: bool) -> None:
    text = '[{"name":"weather","arguments":{"city":"Paris"}}]'
    named = {"type": "function", "function": {"name": "weather"}}
    async with served_by(text, tool_parser="none") as (api, served):
        message = await message_of(
            api, stream=stream, tools=TOOLS, tool_choice=named if choice == "named" else choice
        )
        assert message["calls"] == [("weather", '{"city":"Paris"}')]
        assert (message["content"], message["finish"]) == ("", "tool_calls")
        structured = served.generator.requests[0].sampling.structured
        assert structured is not None and structured.kind == "json_schema"
        schema = json.loads(structured.definition)
        names = [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]]
        assert names == (["weather"] if choice == "named" else ["weather", "time"])
        assert schema.get("maxItems") == (1 if choice == "named" else None)
        assert schema["$defs"]["arguments_0"] == PARAMETERS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("opened", [False, True])
async def test_reasoning_comes_apart(stream: bool, opened: bool) -> None:
    thought = "{}Hm, hm.\n</think>\n\nYes."
    async with served_by(thought.format("" if opened else "<think>\n")) as (api, _):
        extra: dict[str, Any] = {"chat_template_kwargs": {"think": opened}}
        message = await message_of(api, stream=stream, extra_body=extra)
        assert (message["reasoning"], message["content"]) == ("Hm, hm.", "Yes.")
        together = await message_of(
            api, stream=stream, extra_body={**extra, "separate_reasoning": False}
        )
        assert together["content"].endswith("Hm, hm.\n</think>\n\nYes.")
        usage = (
            await api.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
        ).usage
        assert usage is not None and usage.completion_tokens_details is not None
        reasoning_tokens = usage.completion_tokens_details.reasoning_tokens
        made = len(byte_tokenizer().encode(thought.format("" if opened else "<think>\n")).ids)
        assert reasoning_tokens == made - len("\n\nYes.")


async def test_reasoning_can_be_held_until_it_is_whole() -> None:
    async with served_by("<think>one two three</think>four") as (api, _):
        stream: Any = await api.chat.completions.create(
            model="tiny", messages=USER, stream=True, extra_body={"stream_reasoning": False}
        )
        pieces = [
            piece
            async for event in stream
            if (piece := getattr(event.choices[0].delta, "reasoning_content", None))
        ]
        assert pieces == ["one two three"]


async def test_calls_and_their_results_reach_the_template() -> None:
    async with served_by("ok") as (api, served):
        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
        }
        messages: Any = [
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]
        await api.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
        prompt = byte_tokenizer().decode(served.generator.requests[0].prompt_ids)
        assert '<tool_call>weather{"city": "Köln"}' in prompt
        assert "tool\nrain" in prompt


@pytest.mark.parametrize(
    ("tool_parser", "fields", "param"),
    [
        ("none", {"tools": TOOLS}, "tools"),
        ("hermes", {"tool_choice": "required"}, "tools"),
        (
            "hermes",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
    ],
)
async def test_tools_that_can_not_be_called_are_refused(
    tool_parser: str, fields: dict[str, Any], param: str
) -> None:
    async with served_by("ok", tool_parser) as (_, served), client(served) as http:
        body = {"model": "tiny", "messages": USER, **fields}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


async def test_special_tokens_that_mark_a_call_are_seen() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    marker = tokenizer.token_to_id("[TOOL_CALLS]")
    processor = text_processor(
        tokenizer, TEMPLATE, {"eos_token": SPECIALS[EOS]}, {}, tool_format=FORMATS["mistral"]
    )
    ids = tokenizer.encode('weather{"city": "Rome"}').ids

    def script(_: object) -> Script:
        return Script(turns=[[marker], ids, [EOS]], matched_stop=EOS)

    async with (
        serve(ScriptedGenerator(script), text=processor) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as api,
    ):
        for stream in (False, True):
            message = await message_of(api, stream=stream, tools=TOOLS)
            assert message["calls"] == [("weather", '{"city": "Rome"}')]
            assert message["content"] == ""
