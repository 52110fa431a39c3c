"""The functions that a request lets the model call, and which of them it must.

Parsing calls out of the text is router/text/tools; this says what a request asked for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from router.api.fields import Strict, wrong
from router.api.parsing import known_fields, validate

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        shown: dict[str, Any] = self.model_dump(exclude_none=True)
        shown["function"].pop("strict", None)
        return shown


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model calls functions."""

    mode: Literal["auto", "none", "required", "named"]
    name: str = ""
    """Of the one function to call, if the mode is `named`."""

    @property
    def forced(self) -> bool:
        """True if the answer must be calls."""
        return self.mode in ("required", "named")


def parse_tools(value: Any) -> tuple[Tool, ...]:
    """Check the field `tools`.

    Raises:
        InvalidRequestError: names the tool and the field.
    """
    if not isinstance(value, list):
        raise wrong("must be a list of tools")
    if len(value) > MAX_TOOLS:
        raise wrong(f"takes at most {MAX_TOOLS} tools")
    tools = tuple(_tool(item, f"tools[{i}]") for i, item in enumerate(value))
    names = [tool.function.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            param = f"tools[{i}].function.name"
            raise InvalidRequestError(f"{param}: {name!r} is given twice.", param=param)
    return tools


def parse_tool_choice(value: Any) -> ToolChoice:
    """Check the field `tool_choice`."""
    if value in ("auto", "none", "required"):
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "function" and len(value) == 2:
        function = value.get("function")
        if isinstance(function, dict) and list(function) == ["name"]:
            name = function["name"]
            if isinstance(name, str):
                return ToolChoice("named", name)
    raise wrong(
        'must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
    )


_MODES = ("auto", "none", "required")
_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": _MODES},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _FUNCTION_SCHEMA},
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}


def check_choice(tools: tuple[Tool, ...], choice: ToolChoice) -> None:
    """Refuse a choice that the tools do not allow.

    Raises:
        InvalidRequestError: a call is required of no tool, or of one that is not there.
    """
    if choice.forced and not tools:
        raise InvalidRequestError("tool_choice asks for a call, but tools has none.", param="tools")
    if choice.mode == "named" and choice.name not in [tool.function.name for tool in tools]:
        raise InvalidRequestError(
            f"tool_choice names {choice.name!r}, which is not among tools.", param="tool_choice"
        )


def call_constraint(
    tools: tuple[Tool, ...], choice: ToolChoice, *, parallel: bool
) -> StructuredOutput:
    """What an output must be that has to call: a JSON array, which CallListParser reads.

    Args:
        tools: the functions.
        choice: required or named.
        parallel: more than one call may be made.
    """
    named = choice.mode == "named"
    schema = calls_schema([t for t in tools if not named or t.function.name == choice.name])
    if named or not parallel:
        schema["maxItems"] = 1
    return StructuredOutput(kind="json_schema", definition=orjson.dumps(schema).decode())


def calls_schema(tools: Sequence[Tool], arguments: str = "arguments") -> dict[str, Any]:
    """JSON schema of an array of calls, at least one.

    Args:
        tools: the functions that may be called.
        arguments: what a call's arguments stand under.
    """
    schema = call_schema(tools, arguments)
    definitions = schema.pop("$defs")
    return {"type": "array", "minItems": 1, "items": schema, "$defs": definitions}


def call_schema(tools: Sequence[Tool], arguments: str = "arguments") -> dict[str, Any]:
    """JSON schema of one call; see `calls_schema`."""
    alternatives = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                arguments: {"$ref": f"#/$defs/arguments_{i}"},
            },
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    definitions = {
        f"arguments_{i}": _rooted(
            tool.function.parameters or _NO_PARAMETERS, f"#/$defs/arguments_{i}"
        )
        for i, tool in enumerate(tools)
    }
    return {"anyOf": alternatives, "$defs": definitions}


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    kind = value.get("type", "function")
    if isinstance(kind, str) and kind != "function":
        raise InvalidRequestError(
            f"{where}.type {kind[:32]!r} is not supported; send functions.",
            param=f"{where}.type",
        )
    tool = validate(Tool, known_fields(value, Tool, {}, where=f"{where}."), where=f"{where}.")
    if not _NAME.fullmatch(tool.function.name):
        param = f"{where}.function.name"
        raise InvalidRequestError(
            f"{param} must be 1 to 64 letters, digits, underscores, dots or dashes.", param=param
        )
    return tool


def _rooted(schema: Any, root: str) -> Any:
    """The schema with its references pointing to where it stands now."""
    if isinstance(schema, list):
        return [_rooted(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value.removeprefix("#")
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _rooted(value, root)
        for key, value in schema.items()
    }
