import json
from typing import Any

import pytest

from core.errors import InvalidRequestError
from core.sampling import MAX_DEFINITION_BYTES, StructuredOutput
from router.api.requests import ChatRequest, CompletionRequest, read
from router.api.sampling import sampling_params
from router.generation import ServedModel

MODEL = ServedModel(name="m", max_model_len=100, vocab_size=50, eos_token_ids=(2,))
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"type": "string"}}}
NAMED = {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}


def _asked(**fields: Any) -> StructuredOutput | None:
    chat = read(ChatRequest, {"messages": [{"role": "user", "content": "x"}]} | fields)
    completion = read(CompletionRequest, {"prompt": "x"} | fields)
    assert chat.structured == completion.structured
    return sampling_params(
        chat, max_tokens=5, seed=0, model=MODEL, structured=chat.structured
    ).structured


@pytest.mark.parametrize(
    ("fields", "kind", "definition"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            "json_schema",
            SCHEMA,
        ),
        ({"json_schema": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"json_schema": SCHEMA}, "json_schema", SCHEMA),
        ({"regex": r"\d"}, "regex", r"\d"),
        ({"ebnf": "root ::= 'a'"}, "ebnf", "root ::= 'a'"),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_regex": "a"}, "regex", "a"),
        ({"guided_grammar": "g"}, "ebnf", "g"),
        ({"guided_choice": ["é", '"']}, "choice", ["é", '"']),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "a", "choice": None}}, "regex", "a"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ["a"]),
        ({"structured_outputs": {"grammar": "g"}}, "ebnf", "g"),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ],
)
def test_every_way_to_ask_for_a_structure(
    fields: dict[str, Any], kind: str, definition: Any
) -> None:
    asked = _asked(**fields)
    assert asked is not None and asked.kind == kind
    if isinstance(definition, str):
        assert asked.definition == definition
    else:
        # The order of properties is what an output keeps to.
        assert json.dumps(json.loads(asked.definition)) == json.dumps(definition)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}, "regex": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_what_asks_for_nothing(fields: dict[str, Any]) -> None:
    assert _asked(**fields) is None


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "xml"}}, "response_format", "one of text, json_object"),
        ({"response_format": {"typ": "text"}}, "response_format.typ", "did you mean type"),
        (
            {"response_format": {"type": "text", "json_schema": NAMED}},
            "response_format",
            "takes no json_schema",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "must be a JSON schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED | {"strict": 1}}},
            "response_format.json_schema.strict",
            "boolean",
        ),
        ({"json_schema": '{"a":'}, "json_schema", "as JSON it is wrong"),
        ({"json_schema": "[]"}, "json_schema", "an object"),
        ({"json_schema": _deep(400)}, "json_schema", "passed on"),
        ({"regex": ""}, "regex", "not empty"),
        ({"regex": "a" * (MAX_DEFINITION_BYTES + 1)}, "regex", "bytes long"),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "none of them empty"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "did you mean regex"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "string"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "boolean"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar", ""),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "send one"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "send one"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        _asked(**fields)
    assert (caught.value.param, says in caught.value.message) == (param, True), caught.value.message
