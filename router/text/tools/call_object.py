"""A call written as a JSON object: `{"name": ..., "arguments": {...}}`, in either order.

The formats that write calls this way put it between their own markers. `parameters` is Llama's name
for arguments. Other members are skipped.
"""

import json
from collections.abc import Callable
from enum import Enum, auto

from router.text.tools.events import CallArguments, CallBegun, CallEnded, ToolEvent
from router.text.tools.json_value import JsonValue

_ARGUMENTS = frozenset({"arguments", "parameters"})


class CallState(Enum):
    """How far a call has come."""

    READING = auto()
    DONE = auto()
    BROKEN = auto()
    """It is no call, or not a whole one: the character just taken can't follow."""


class _Expect(Enum):
    OBJECT = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()


class CallObject:
    """Reads one call. Arguments go out as they come, once the function's name is known."""

    def __init__(self, is_function: Callable[[str], bool] = bool) -> None:
        """Start before its opening brace.

        Args:
            is_function: whether a name can be called; an object with another one is no call.
        """
        self.raw = ""
        """All that was taken."""
        self.announced = False
        """True once an event said that this is a call."""
        self.state = CallState.READING
        self._is_function = is_function
        self._expect = _Expect.OBJECT
        self._value: JsonValue | None = None
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None

    def take(self, character: str) -> list[ToolEvent]:
        """Take the next character. Not to be called once it is DONE or BROKEN."""
        self.raw += character
        if self._value is not None:
            if self._value.ends_before(character):
                events = self._value_ended(self._value.text)
                self._value = None
                return events + self._take_between(character)
            return self._take_value(self._value, character)
        return self._take_between(character)

    def _take_between(self, character: str) -> list[ToolEvent]:
        if character.isspace():
            return []
        match self._expect, character:
            case _Expect.OBJECT, "{":
                self._expect = _Expect.FIRST_KEY
            case ((_Expect.FIRST_KEY | _Expect.KEY), '"'):
                return self._begin_value(character)
            case _Expect.COLON, ":":
                self._expect = _Expect.VALUE
            case _Expect.VALUE, _ if character not in ",:}]":
                return self._begin_value(character)
            case _Expect.NEXT, ",":
                self._expect = _Expect.KEY
            case ((_Expect.FIRST_KEY | _Expect.NEXT), "}"):
                return self._close()
            case _:
                self.state = CallState.BROKEN
        return []

    def _begin_value(self, character: str) -> list[ToolEvent]:
        self._value = JsonValue()
        return self._take_value(self._value, character)

    def _take_value(self, value: JsonValue, character: str) -> list[ToolEvent]:
        ended = value.take(character)
        events: list[ToolEvent] = []
        if self._streams(value):
            if not self.announced:
                events.append(self._announce())
            events.append(CallArguments(character))
        if ended:
            self._value = None
            events += self._value_ended(value.text)
        return events

    def _streams(self, value: JsonValue) -> bool:
        """Whether the value goes out while it is read."""
        is_arguments = self._expect is _Expect.VALUE and self._key in _ARGUMENTS
        first = self._arguments is None
        return is_arguments and first and value.nested and self._name is not None

    def _value_ended(self, text: str) -> list[ToolEvent]:
        if self._expect is not _Expect.VALUE:
            self._key = _string(text) or ""
            self._expect = _Expect.COLON
            return []
        self._expect = _Expect.NEXT
        if self._key == "name":
            return self._take_name(_string(text))
        if self._key in _ARGUMENTS:
            return self._take_arguments(text)
        return []

    def _take_name(self, name: str | None) -> list[ToolEvent]:
        if self._name is not None:
            return []  # a member given twice: the first counts
        if not name or not self._is_function(name):
            self.state = CallState.BROKEN
            return []
        self._name = name
        if self._arguments is None:
            return []
        return [self._announce(), CallArguments(self._arguments)]

    def _take_arguments(self, text: str) -> list[ToolEvent]:
        if self._arguments is not None:
            return []  # likewise
        if self.announced:
            self._arguments = text
            return []
        # Some models write the object as a string, and null for no arguments.
        self._arguments = "{}" if text == "null" else _string(text) or text
        if self._name is None:
            return []
        return [self._announce(), CallArguments(self._arguments)]

    def _announce(self) -> CallBegun:
        assert self._name is not None
        self.announced = True
        return CallBegun(self._name)

    def _close(self) -> list[ToolEvent]:
        if self._name is None:
            self.state = CallState.BROKEN
            return []
        self.state = CallState.DONE
        if self.announced:
            return [CallEnded()]
        return [self._announce(), CallArguments("{}"), CallEnded()]


def _string(text: str) -> str | None:
    """Value of a JSON string; None if it is not one."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
