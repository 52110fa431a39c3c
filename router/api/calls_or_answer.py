"""What an output must be where the model may call functions and its answer must have a structure.

Its choice is kept: the grammar takes calls as the model writes them, or the answer, and nothing
else. It is written in Lark as llguidance reads it, the workers' default; another library refuses.
"""

import json
from collections.abc import Sequence
from typing import Any

import orjson

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from router.api.tools import Tool, call_schema, calls_schema
from router.text.processor import TextProcessor
from router.text.tools.formats import ToolFormat

_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""White space inside JSON, as models write it."""


def calls_or_answer(
    tools: Sequence[Tool],
    answer: StructuredOutput,
    text: TextProcessor,
    *,
    tool_format: ToolFormat,
    parallel: bool,
) -> StructuredOutput:
    """The grammar.

    Args:
        tools: the functions.
        answer: what the text must be if nothing is called.
        text: knows which markers are tokens of their own.
        tool_format: how the model writes calls.
        parallel: more than one call may be made.

    Raises:
        InvalidRequestError: the answer's structure is no JSON.
    """
    if answer.kind not in ("json_object", "json_schema"):
        raise InvalidRequestError(
            f"An output can't be held to a structure of kind {answer.kind} while the model may "
            'call functions; use a JSON schema, send tool_choice "none", or leave one of the two '
            "out.",
            param="tools",
        )
    schema = orjson.loads(answer.definition) if answer.definition else {"type": "object"}
    style = tool_format.style
    body = (
        calls_schema(tools, style.arguments) if style.array else call_schema(tools, style.arguments)
    )
    call = " ".join([*_parts(style.before, text), "body", *_parts(style.after, text)])
    separator = " ".join(_parts(style.between, text))
    repeated = f"({separator} call)*" if parallel and not style.array else ""
    if style.array and not parallel:
        body["maxItems"] = 1
    grammar = (
        f"start: calls | answer\ncalls: call {repeated}\ncall: {call}\n"
        f"body: {_json(body)}\nanswer: {_json(schema)}\n"
    )
    return StructuredOutput(kind="ebnf", definition=grammar)


def _parts(parts: Sequence[str], text: TextProcessor) -> list[str]:
    """Markers by their ids where they are tokens of their own, else as text."""
    ids = [(part, text.added_token_id(part)) for part in parts]
    return [json.dumps(part) if token is None else f"<[{token}]>" for part, token in ids]


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({'x-guidance': _SPACING, **schema})}"
