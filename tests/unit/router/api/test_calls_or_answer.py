"""The grammar of calls or an answer, as the worker's library reads it."""

import json
from typing import Any

import pytest

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from engine.grammar.llguidance_backend import LlguidanceBackend
from router.api.calls_or_answer import calls_or_answer
from router.api.tools import parse_tools
from router.text.loading import text_processor
from router.text.tools.formats import FORMATS
from tests.support.router_api import EOS, byte_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}
TOOLS = parse_tools(
    [
        {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
        {"type": "function", "function": {"name": "time"}},
    ]
)
ANSWER = {
    "type": "object",
    "properties": {"sun": {"type": "boolean"}},
    "required": ["sun"],
    "additionalProperties": False,
}
ROME = {"name": "weather", "arguments": {"city": "Rome"}}
TIME: dict[str, Any] = {"name": "time", "arguments": {}}


def accepts(name: str, said: str, *, added: list[str], parallel: bool = True) -> bool:
    """Whether an output may be `said` as a whole."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(added)
    structured = calls_or_answer(
        TOOLS,
        StructuredOutput(kind="json_schema", definition=json.dumps(ANSWER)),
        text_processor(tokenizer, None, {}, {}),
        tool_format=FORMATS[name],
        parallel=parallel,
    )
    size = tokenizer.get_vocab_size()
    backend = LlguidanceBackend(tokenizer.to_str(), size, [EOS])
    matcher = backend.compile(structured).start()
    words = backend_words(size)
    for token_id in [*tokenizer.encode(said).ids, EOS]:
        matcher.fill(words)
        if not words[token_id // 32] >> (token_id % 32) & 1:
            return False
        matcher.accept([token_id])
    return True


def backend_words(size: int) -> Any:
    import numpy as np

    return np.zeros((size + 31) // 32, np.int32)


HERMES = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in (ROME, TIME)]
LLAMA = [
    json.dumps({"name": call["name"], "parameters": call["arguments"]}) for call in (ROME, TIME)
]
MISTRAL = [f"[TOOL_CALLS] {json.dumps(calls)}" for calls in ([ROME], [ROME, TIME])]


@pytest.mark.parametrize(
    ("name", "one", "two", "markers"),
    [
        ("hermes", HERMES[0], "\n".join(HERMES), ["<tool_call>", "</tool_call>"]),
        ("llama3", LLAMA[1], "; ".join(LLAMA), ["<|python_tag|>"]),
        ("mistral", MISTRAL[0], MISTRAL[1], ["[TOOL_CALLS]"]),
    ],
)
@pytest.mark.parametrize("as_tokens", [False, True])
def test_calls_in_the_models_own_format_or_the_answer(
    name: str, one: str, two: str, markers: list[str], as_tokens: bool
) -> None:
    added = markers if as_tokens else []
    assert accepts(name, '{"sun": true}', added=added)
    assert accepts(name, one, added=added)
    assert accepts(name, two, added=added)
    assert not accepts(name, two, added=added, parallel=False)
    assert not accepts(name, one.replace("Rome", "Bonn").replace("time", "tide"), added=added)
    assert not accepts(name, f"Well, {one}", added=added)
    assert not accepts(name, '{"sun": 1}', added=added)


def test_a_structure_that_is_no_json_leaves_no_room_for_calls() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        calls_or_answer(
            TOOLS,
            StructuredOutput(kind="regex", definition="a+"),
            text_processor(byte_tokenizer(), None, {}, {}),
            tool_format=FORMATS["hermes"],
            parallel=True,
        )
    assert refused.value.param == "tools"
