import re
from typing import Any

import pytest

from core.errors import InvalidRequestError
from router.api.parsing import parse_json
from router.api.requests import MAX_STOP_CHARS, ChatRequest, CompletionRequest, read
from router.api.unserved import UNSERVED

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _refused(model: type[Any], **fields: Any) -> InvalidRequestError:
    base = {"messages": [USER]} if model is ChatRequest else {"prompt": "x"}
    with pytest.raises(InvalidRequestError) as caught:
        read(model, base | fields)
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "is required"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": ["hi"]}, "messages[0]", "must be an object"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "is required"),
        ({"messages": [USER | {"content": 5}]}, "messages[0].content", "got 5"),
        ({"messages": [USER | {"role": "robot"}]}, "messages[0].role", "robot"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "messages[0].tool_calls[0].id", "required"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", "assistant"),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "messages[0].tool_call_id", "of a tool"),
        ({"messages": [USER | {"role": "tool"}]}, "messages[0].tool_call_id", "is required"),
        ({"messages": [USER | {"contnet": 1}]}, "messages[0].contnet", "did you mean content"),
        ({"temperature": "hot"}, "temperature", '"hot"'),
        ({"temperature": True}, "temperature", "number"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": 0}, "n", "greater"),
        ({"max_tokens": 1e30}, "max_tokens", "integer"),
        ({"seed": 2**64}, "seed", "less"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop": [1]}, "stop", "list of strings"),
        ({"stop": ""}, "stop", "1 to"),
        ({"stop": "x" * (MAX_STOP_CHARS + 1)}, "stop", "1 to"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]", "integer"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": "a"}}, "logit_bias", "numbers"),
        ({"logit_bias": [1]}, "logit_bias", "object"),
        ({"stream_options": {"usagee": 1}}, "stream_options.usagee", "Unknown field"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"stream_options": 1}, "stream_options", "object"),
        ({"tools": {}}, "tools", "list"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "twice"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [TOOL | {"x": 1}]}, "tools[0].x", "Unknown field"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "letters",
        ),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "name"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "not supported"),
        ({"audio": {}}, "audio", "not supported"),
        ({"max_token": 5}, "max_token", "did you mean max_tokens"),
        ({"zzzz": None}, "zzzz", "Unknown field"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "dictionary"),
    ],
)
def test_wrong_chat_field_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    error = _refused(ChatRequest, **fields)
    assert (error.param, message in error.message) == (param, True), error.message


@pytest.mark.parametrize(
    "prompt", [5, [], [1, "a"], [[1], "a"], [[1], 2], [["a"]], [True], {"a": 1}, [1.0]]
)
def test_wrong_prompt_is_named(prompt: Any) -> None:
    assert _refused(CompletionRequest, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {}},
        {"type": 5},
        {"type": "text"},
        {"type": "text", "text": "a", "cache_control": 1},
        "text",
    ],
)
def test_content_part_that_is_not_text_is_refused(part: Any) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, part]}
    error = _refused(ChatRequest, messages=[message])
    assert error.param == "messages[0].content"
    assert "part 1" in error.message


def test_text_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read(ChatRequest, {"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ("ab",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_every_form_of_prompt_is_taken(prompt: Any, expected: Any) -> None:
    assert read(CompletionRequest, {"prompt": prompt}).prompt == expected


def test_null_means_the_default_everywhere() -> None:
    plain = read(ChatRequest, {"messages": [USER]})
    nulls = dict.fromkeys(set(ChatRequest.model_fields) - {"messages"})
    message = USER | {"tool_calls": None, "name": None, "refusal": None}
    assert read(ChatRequest, {"messages": [message], "tools": None} | nulls) == plain


def test_values_that_ask_for_nothing_are_taken() -> None:
    asked = {
        "tools": [],
        "response_format": {"type": "text"},
        "store": False,
        "service_tier": "auto",
    }
    read(ChatRequest, {"messages": [USER]} | asked)
    assert _refused(ChatRequest, store=0).param == "store"


def test_integer_is_taken_where_a_number_is_wanted() -> None:
    assert read(ChatRequest, {"messages": [USER], "temperature": 0}).temperature == 0.0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"1", b"null", b"\xff", b'{"a":NaN}'])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="body"):
        parse_json(body)


LISTED = re.findall(
    r"\w+",
    """
    messages model temperature top_p n stream stream_options stop max_tokens max_completion_tokens
    presence_penalty frequency_penalty logit_bias logprobs top_logprobs seed user tools tool_choice
    parallel_tool_calls response_format reasoning_effort top_k min_p min_tokens repetition_penalty
    regex ebnf stop_token_ids stop_regex no_stop_trim ignore_eos skip_special_tokens lora_path
    continue_final_message chat_template_kwargs separate_reasoning stream_reasoning session_params
    rid cache_salt extra_key priority return_hidden_states return_token_ids custom_logit_processor
    input_ids bootstrap_host bootstrap_port bootstrap_room kv_transfer_params prompt echo suffix
    best_of json_schema
    """,
)


@pytest.mark.parametrize("field", LISTED)
def test_a_field_that_other_servers_take_is_served_or_refused_by_name(field: str) -> None:
    served = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert (field in served) != (field in UNSERVED)
    if field in UNSERVED:
        message = _refused(ChatRequest, **{field: {"ask": "for something"}}).message
        assert message.startswith(f"{field} is not supported by this server; ")
