"""/v1/responses through the openai client."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from core.errors import WorkerLostError
from core.finish import FinishReason
from router.api.settings import ApiSettings
from router.text.loading import text_processor
from router.text.tools.formats import FORMATS
from tests.integration.router_api.test_tools import CALL, TEMPLATE
from tests.support.router_api import (
    EOS,
    SPECIALS,
    Gate,
    Script,
    ScriptedGenerator,
    Served,
    byte_tokenizer,
    client,
    says,
    serve,
    until,
)

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object"},
    "strict": False,
}


@asynccontextmanager
async def served_by(
    script: Script, settings: ApiSettings | None = None
) -> AsyncIterator[tuple[openai.AsyncOpenAI, Served]]:
    processor = text_processor(
        byte_tokenizer(),
        TEMPLATE,
        {"eos_token": SPECIALS[EOS]},
        {},
        tool_format=FORMATS["hermes"],
        reasons=True,
    )
    async with (
        serve(ScriptedGenerator(lambda _: script), text=processor, settings=settings) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as api,
    ):
        yield api, served


def prompt_of(served: Served) -> str:
    ids = served.generator.requests[-1].prompt_ids
    return byte_tokenizer().decode(ids, skip_special_tokens=False)


async def test_whole_response_has_items_and_usage() -> None:
    async with served_by(says(f"<think>Hm.</think>Sure.\n{CALL}", cached_tokens=3)) as (
        api,
        served,
    ):
        response = await api.responses.create(
            model="tiny",
            instructions="Be brief.",
            input="hi",
            tools=[TOOL],
            metadata={"a": "b"},
            max_output_tokens=99,
        )
        assert response.status == "completed" and response.error is None
        reasoning, message, call = response.output
        assert reasoning.type == "reasoning" and reasoning.content
        assert reasoning.content[0].text == "Hm."
        assert response.output_text == "Sure."
        assert message.type == "message" and message.status == "completed"
        assert call.type == "function_call" and call.name == "weather"
        assert call.arguments == '{"city": "Paris"}' and call.call_id.startswith("call_")
        assert response.usage is not None
        assert response.usage.input_tokens == len(served.generator.requests[0].prompt_ids)
        assert response.usage.input_tokens_details.cached_tokens == 3
        assert response.usage.output_tokens_details.reasoning_tokens == len("<think>Hm.</think>")
        assert response.metadata == {"a": "b"} and response.instructions == "Be brief."
        assert served.generator.requests[0].sampling.max_tokens == 99
        assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt_of(served)
        assert len({item.id for item in response.output}) == 3


async def test_stream_has_typed_events_that_build_the_response() -> None:
    async with served_by(says(f"<think>Hm.</think>Sure.\n{CALL}")) as (api, _):
        stream = await api.responses.create(model="tiny", input="hi", tools=[TOOL], stream=True)
        events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind not in kinds[i - 1 : i]] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    arguments = "".join(
        e.delta for e in events if e.type == "response.function_call_arguments.delta"
    )
    last: Any = events[-1]
    assert text == last.response.output_text == "Sure."
    assert arguments == last.response.output[2].arguments == '{"city": "Paris"}'
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output
    added: Any = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.status for item in added] == ["in_progress"] * 3
    assert added[2].arguments == ""


@pytest.mark.parametrize("stream", [False, True])
async def test_conversation_goes_on_from_a_stored_response(stream: bool) -> None:
    async with served_by(says("Sure.")) as (api, served):
        first: Any = await api.responses.create(
            model="tiny", instructions="Once.", input="one", stream=stream
        )
        if stream:
            first = [event async for event in first][-1].response
        second = await api.responses.create(
            model="tiny", input="two", previous_response_id=first.id
        )
        assert prompt_of(served) == (
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nSure.<|im_end|>\n"
            "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )
        found = await api.responses.retrieve(second.id)
        assert found == second and found.previous_response_id == first.id
        await api.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(first.id)
        with pytest.raises(openai.NotFoundError) as refused:
            await api.responses.create(model="tiny", input="x", previous_response_id=first.id)
        assert refused.value.param == "previous_response_id"


async def test_store_is_bounded_and_optional() -> None:
    async with served_by(says("ok"), ApiSettings(stored_responses=1)) as (api, _):
        kept = await api.responses.create(model="tiny", input="a")
        unkept = await api.responses.create(model="tiny", input="b", store=False)
        await api.responses.retrieve(kept.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(unkept.id)
        await api.responses.create(model="tiny", input="c")
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(kept.id)


async def test_items_become_the_messages_of_a_chat() -> None:
    async with served_by(says("ok")) as (api, served):
        await api.responses.create(
            model="tiny",
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
                },
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
                {"type": "function_call_output", "call_id": "c", "output": "2"},
            ],
        )
        assert prompt_of(served).startswith(
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nLet me see."
            '<tool_call>f{"a": 1}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n'
        )


async def test_output_that_was_cut_off_is_incomplete() -> None:
    script = says("half of it", reason=FinishReason.LENGTH)
    async with served_by(script) as (api, _):
        response = await api.responses.create(model="tiny", input="a", max_output_tokens=20)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        stream = await api.responses.create(model="tiny", input="a", stream=True)
        last: Any = [event async for event in stream][-1]
        assert last.type == "response.incomplete"
        assert last.response.output[0].status == "incomplete"


async def test_failure_in_a_stream_is_an_error_event_and_a_failed_response() -> None:
    async with served_by(Script(turns=[[100], WorkerLostError("gone")])) as (_, served):
        async with client(served) as http:
            body = {"model": "tiny", "input": "a", "stream": True}
            answer = await http.post("/v1/responses", json=body)
        kinds = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
        assert kinds[-2:] == ["error", "response.failed"]
        assert '"worker_lost"' in answer.text


async def test_text_can_be_held_to_a_schema() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with served_by(says('{"a":1}')) as (api, served):
        response = await api.responses.create(
            model="tiny",
            input="a",
            text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        )
        structured = served.generator.requests[0].sampling.structured
        assert structured is not None and structured.kind == "json_schema"
        assert json.loads(structured.definition) == schema
        assert response.text is not None and response.text.format is not None
        assert response.text.format.type == "json_schema"


async def test_running_response_can_be_cancelled() -> None:
    async with served_by(Script(turns=[[100], Gate()])) as (api, served), client(served) as http:
        stream = await api.responses.create(model="tiny", input="a", stream=True)
        created: Any = await anext(aiter(stream))
        await until(lambda: served.generator.running == 1)
        answer = await http.post(f"/v1/responses/{created.response.id}/cancel")
        assert answer.json()["status"] == "cancelled"
        events: list[Any] = [event async for event in stream]
        assert events[-1].response.status == "cancelled"
        assert served.generator.running == 0
        again = await http.post(f"/v1/responses/{created.response.id}/cancel")
        assert again.status_code == 409
        assert (await http.post("/v1/responses/nope/cancel")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text"),
        (
            {
                "input": "a",
                "tools": [TOOL],
                "tool_choice": "required",
                "text": {"format": {"type": "json_object"}},
            },
            "tool_choice",
        ),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "max_output_tokens": 9999}, "input"),
        ({"input": "a", "temperature": -1}, "temperature"),
        ({"input": "a", "inputs": 1}, "inputs"),
        ({"input": ""}, None),
    ],
)
async def test_wrong_fields_are_named(fields: dict[str, Any], param: str | None) -> None:
    async with served_by(says("ok")) as (_, served), client(served) as http:
        answer = await http.post("/v1/responses", json={"model": "tiny", **fields})
        if param is None:
            assert answer.status_code == 200
            return
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
