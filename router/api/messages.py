"""The messages of a conversation, and how they reach the chat template."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from core.errors import InvalidRequestError
from router.api.fields import Strict, wrong
from router.api.parsing import known_fields, validate

UNSERVED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}
)
MAX_MESSAGES = 8192
"""And text parts of one."""


class FunctionCall(Strict):
    """What an earlier answer called."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


def _content(value: Any) -> str:
    """Text of a message: a string, or text parts, one to a line."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong("must be a string or a list of text parts")
    if len(value) > MAX_MESSAGES:
        raise wrong(f"takes at most {MAX_MESSAGES} parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise wrong(f"part {i} must be an object with a type")
        if kind != "text":
            raise wrong(f"part {i} is of type {kind[:32]}, which is not supported; send text")
        if not isinstance(part.get("text"), str):
            raise wrong(f"part {i} must have text, a string")
        if part.keys() - {"type", "text"}:
            raise wrong(f"part {i} may only have type and text")
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
CONTENT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]
}


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_content), WithJsonSchema(CONTENT_SCHEMA)] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: absent where there is nothing, arguments as objects."""
        shown = self.model_dump(exclude_none=True)
        if not self.tool_calls:
            del shown["tool_calls"]
        for call in shown.get("tool_calls", ()):
            call["function"]["arguments"] = _object_of(call["function"]["arguments"])
        return shown


def _object_of(arguments: str) -> Any:
    # A template writes them as JSON; a string would be quoted once more.
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def parse_messages(value: Any) -> tuple[Message, ...]:
    """Check the messages of a request.

    Raises:
        InvalidRequestError: names the message and the field.
    """
    if not isinstance(value, list) or not value:
        raise wrong("must be a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise wrong(f"takes at most {MAX_MESSAGES} messages")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    fields = known_fields(value, Message, UNSERVED, where=f"{where}.")
    if isinstance(fields.get("tool_calls"), list):
        fields["tool_calls"] = tuple(
            _tool_call(call, f"{where}.tool_calls[{i}]")
            for i, call in enumerate(fields["tool_calls"])
        )
    message = validate(Message, fields, where=f"{where}.")
    if message.role != "assistant" and message.tool_calls:
        raise InvalidRequestError(
            f"{where}.tool_calls is only for messages of the assistant.",
            param=f"{where}.tool_calls",
        )
    if message.role != "tool" and message.tool_call_id is not None:
        raise InvalidRequestError(
            f"{where}.tool_call_id is only for messages of a tool.", param=f"{where}.tool_call_id"
        )
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequestError(
            f"{where}.tool_call_id is required: say which call the message answers.",
            param=f"{where}.tool_call_id",
        )
    if "content" not in fields and not message.tool_calls:
        raise InvalidRequestError(f"{where}.content is required.", param=f"{where}.content")
    return message


def _tool_call(value: Any, where: str) -> ToolCall:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    # Clients that put a call together from a stream's deltas leave its index in.
    fields = {key: each for key, each in value.items() if key != "index"}
    return validate(ToolCall, fields, where=f"{where}.")
