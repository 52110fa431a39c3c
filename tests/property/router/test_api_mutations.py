"""Requests with something wrong in them: whatever it is, the answer says so and is no 500."""

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from core.errors import InvalidRequestError
from router.access.door import Door
from router.api.bounds import MAX_CONTAINERS
from router.api.parsing import MAX_DEPTH, parse_json
from router.api.settings import ApiSettings
from router.app import create_app
from router.text.loading import text_processor
from router.text.tools.formats import FORMATS
from tests.support.api_keys import KeyRing
from tests.support.router_api import (
    EOS,
    SPECIALS,
    NoFleet,
    ScriptedGenerator,
    ScriptedView,
    byte_tokenizer,
    says,
)

RING = KeyRing(root={"admin": True}, user={"tokens_per_minute": 10**9})
APP = create_app(
    generator=ScriptedGenerator(lambda _: says("ok")),
    fleet=NoFleet(),
    facts={},
    text=text_processor(
        byte_tokenizer(),
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{{ m.content }}"
        "{{ m.tool_calls | default([]) | tojson }}{% endfor %}{{ reasoning_effort }}",
        {"eos_token": SPECIALS[EOS]},
        {},
        tool_format=FORMATS["hermes"],
    ),
    settings=ApiSettings(body_limit_bytes=200_000),
    observed=ScriptedView(),
    registry=CollectorRegistry(),
    door=Door(RING.keys),
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/c"}},
    "$defs": {"c": {"type": "string"}},
}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"65": 2},
    "stop": ["x", "yy"],
    "stop_token_ids": [7],
    "ignore_eos": False,
    "skip_special_tokens": True,
}
MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "a"}]},
    {"role": "user", "content": "b", "name": "n"},
    {
        "role": "assistant",
        "reasoning_content": "c",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "d"},
]
SHARED = {
    "seed": 1,
    "user": "u",
    "cache_salt": "s",
    "extra_key": "e",
    "n": 2,
    "min_tokens": 1,
    "max_tokens": 9,
    "rid": "mine",
    "stream_options": {"include_usage": True},
    "stream": True,
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"x": 1},
        **SAMPLING,
        **SHARED,
    },
    "/v1/completions": {
        "prompt": ["a", "b"],
        "echo": True,
        "logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        **SAMPLING,
        **SHARED,
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "b"}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "c"},
        ],
        "instructions": "i",
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
        "max_output_tokens": 5,
    },
    "/generate": {
        "text": ["a", "b"],
        "sampling_params": [{"max_new_tokens": 3, "n": 2, "json_schema": "{}"}, {"n": 2}],
        "rid": ["r1", "r2"],
        "return_logprob": True,
        "top_logprobs_num": 1,
        "logprob_start_len": 0,
        "stream": False,
    },
    "/abort_request": {"rid": ["a", "b"], "abort_all": False},
    "/flush_cache": {},
    "/tokenize": {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": FUNCTION}],
        "add_generation_prompt": True,
        "return_token_strs": True,
    },
    "/v1/tokenize": {"prompt": "a", "add_special_tokens": True},
    "/detokenize": {"tokens": [65, 66], "skip_special_tokens": True},
    "/v1/detokenize": {"tokens": []},
    "/v1/responses/resp_1/cancel": {},
}
ODD: list[Any] = [None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0]
ODD += ["", "\x00", "a" * 70_000, "{", "[" * 2000, "\ufffe🜁", "auto", "<|im_start|>"]
ODD += [[], [[]], ["a"] * 9, list(range(9000)), [{}] * 9000]
ODD += [{}, {"": None}, {"$ref": "#"}, {"type": "function"}, {"a" * 70_000: 1}]
STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be changed."""
    yield at
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(each, (*at, key))


def _changed(body: Any, place: tuple[Any, ...], how: str, value: Any) -> Any:
    if not place:
        return value
    body = copy.deepcopy(body)
    parent = body
    for key in place[:-1]:
        parent = parent[key]
    last = place[-1]
    if how == "drop":
        del parent[last]
    elif how == "add":
        if isinstance(parent, dict):
            parent["zz"] = value
        else:
            parent.append(value)
    elif how == "wrap":
        parent[last] = [parent[last]]
    else:
        parent[last] = value
    return body


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from(sorted(VALID)))
    body: Any = VALID[path]
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(list(_places(body))))
        how = draw(st.sampled_from(["replace", "replace", "drop", "add", "wrap"]))
        body = _changed(body, place, how, draw(STRANGE))
        if not isinstance(body, dict):
            break
    try:
        raw = orjson.dumps(body)
    except TypeError:  # an integer that is no JSON for this library
        raw = str(body).replace("'", '"').encode("utf-8", "replace")
    if draw(st.integers(0, 5)) == 0:
        cut = draw(st.integers(0, max(0, len(raw) - 1)))
        raw = raw[:cut] + draw(st.binary(max_size=4)) + raw[cut + draw(st.integers(0, 4)) :]
    return path, raw


async def post(path: str, raw: bytes, name: str = "root") -> httpx.Response:
    transport = httpx.ASGITransport(APP, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        headers = {"content-type": "application/json", **RING.bearer(name)}
        return await http.post(path, content=raw, headers=headers)


@pytest.mark.parametrize("path", sorted(VALID))
def test_the_requests_that_are_changed_below_were_right(path: str) -> None:
    answer = asyncio.run(post(path, orjson.dumps(VALID[path])))
    if "cancel" in path:
        assert answer.status_code == 404
    else:
        assert answer.status_code == 200, answer.text


@given(requests())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_wrong_with_a_request_the_answer_is_no_500(request: tuple[str, bytes]) -> None:
    answer = asyncio.run(post(*request, "user"))
    assert answer.status_code in (200, 400, 403, 404, 409, 413), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 240, 1000, 50_000])
@pytest.mark.parametrize("shape", ["[]", "{}"])
def test_nesting_that_would_exhaust_the_stack_is_refused(depth: int, shape: str) -> None:
    opening = "[" if shape == "[]" else '{"a":'
    nested = opening * (depth - 1) + ("[]" if shape == "[]" else "{}") + shape[1] * (depth - 1)
    for path, field in (
        ("/v1/chat/completions", "tools"),
        ("/v1/chat/completions", "chat_template_kwargs"),
        ("/v1/completions", "json_schema"),
        ("/v1/responses", "input"),
    ):
        body = orjson.dumps(VALID[path] | {field: "HERE"}).replace(b'"HERE"', nested.encode())
        answer = asyncio.run(post(path, body))
        assert answer.status_code in (400, 413), answer.text
    arguments = "[" * 90_000
    messages = copy.deepcopy(MESSAGES)
    messages[2]["tool_calls"][0]["function"]["arguments"] = arguments  # type: ignore[index]
    body = orjson.dumps({"messages": messages})
    assert asyncio.run(post("/tokenize", body)).status_code == 200


def test_numbers_and_lengths_of_things_are_bounded() -> None:
    for path, field, value in (
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "a"}] * 5000),
        ("/v1/chat/completions", "tools", [{"type": "function", "function": FUNCTION}] * 129),
        ("/v1/chat/completions", "stop", ["a"] * 17),
        ("/v1/chat/completions", "stop", "a" * 1025),
        ("/v1/chat/completions", "stop_token_ids", [1] * 1025),
        ("/v1/chat/completions", "logit_bias", {str(i): 1 for i in range(4097)}),
        ("/v1/chat/completions", "user", "u" * 513),
        ("/v1/chat/completions", "rid", "r" * 129),
        ("/v1/chat/completions", "cache_salt", "s" * 257),
        ("/v1/chat/completions", "extra_key", "s" * 257),
        ("/v1/chat/completions", "model", "m" * 513),
        ("/v1/completions", "prompt", ["a"] * 129),
        ("/v1/responses", "input", [{"role": "user", "content": "a"}] * 5000),
        ("/abort_request", "rid", ["r"] * 1025),
        ("/v1/chat/completions", "chat_template_kwargs", {f"k{i}": 1 for i in range(65)}),
    ):
        answer = asyncio.run(post(path, orjson.dumps(VALID[path] | {field: value})))
        assert answer.status_code in (400, 413), (field, answer.text[:200])


def test_arrays_and_objects_are_counted_outside_of_strings_only() -> None:
    prompt = '[{"\\' * 20_000
    read = parse_json(orjson.dumps({"prompt": prompt * 3}))
    assert read == {"prompt": prompt * 3}
    for inner in ("[]", "{}", '["[\\\\",{}]'):
        count = MAX_CONTAINERS // inner.count(inner[0]) + 1
        with pytest.raises(InvalidRequestError, match="arrays and objects"):
            parse_json(b'{"prompt":[' + b",".join([inner.encode()] * count) + b"]}")
