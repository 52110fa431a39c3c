"""The items of a response's input, as the messages of a chat.

An assistant's reasoning, text and calls are items of their own here and one message there.
"""

from collections.abc import Sequence
from typing import Any

from core.errors import InvalidRequestError
from router.api.messages import FunctionCall, Message, ToolCall

_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_ROLES = ("user", "assistant", "system", "developer")


def messages_of(items: str | Sequence[Any]) -> list[Message]:
    """Messages of the field `input`.

    Raises:
        InvalidRequestError: names the item that is wrong or not supported.
    """
    if isinstance(items, str):
        return [Message(role="user", content=items)]
    turns = _Turns()
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise _wrong(where, "must be an object")
        _take(item, where, turns)
    return turns.end()


def _take(item: dict[str, Any], where: str, turns: "_Turns") -> None:
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in _ROLES:
                raise _wrong(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
            content = _text(item.get("content"), f"{where}.content")
            if role == "assistant":
                turns.say(content)
            else:
                turns.add(Message(role=role, content=content))
        case "function_call":
            function = FunctionCall(
                name=_string(item, "name", where), arguments=_string(item, "arguments", where)
            )
            turns.call(ToolCall(id=_string(item, "call_id", where), function=function))
        case "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            call_id = _string(item, "call_id", where)
            turns.add(Message(role="tool", tool_call_id=call_id, content=output))
        case "reasoning":
            turns.think(_reasoning(item, where))
        case kind:
            raise _wrong(f"{where}.type", f"{str(kind)[:40]!r} is not supported")


class _Turns:
    """Puts the items of one turn of the assistant together."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._reasoning: str | None = None
        self._content: str | None = None
        self._calls: list[ToolCall] = []

    def think(self, text: str) -> None:
        self._close()
        self._reasoning = text

    def say(self, text: str) -> None:
        if self._calls or self._content is not None:
            self._close()
        self._content = text

    def call(self, call: ToolCall) -> None:
        self._calls.append(call)

    def add(self, message: Message) -> None:
        self._close()
        self._messages.append(message)

    def end(self) -> list[Message]:
        self._close()
        return self._messages

    def _close(self) -> None:
        if self._content is not None or self._calls:
            self._messages.append(
                Message(
                    role="assistant",
                    content=self._content or "",
                    reasoning_content=self._reasoning,
                    tool_calls=tuple(self._calls),
                )
            )
        self._reasoning = self._content = None
        self._calls = []


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong(where, "must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise _wrong(f"{where}[{i}]", f"of type {str(kind)[:40]!r} is not supported; send text")
        texts.append(_string(part, "text", f"{where}[{i}]"))
    return "\n".join(texts)


def _reasoning(item: dict[str, Any], where: str) -> str:
    parts = item.get("content") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _wrong(f"{where}.content", "must be a list of parts")
    return "\n".join(_string(part, "text", f"{where}.content[{i}]") for i, part in enumerate(parts))


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _wrong(f"{where}.{name}", "must be a string")
    return value


def _wrong(param: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {message}.", param=param)
