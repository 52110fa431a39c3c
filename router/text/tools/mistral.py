"""The formats of Mistral, all after the marker `[TOOL_CALLS]`.

Either a JSON array, `[{"name": ..., "arguments": {...}}]`, or, from tokenizer version 11 on, the
name and then the arguments, `name{...}` or `name[ARGS]{...}`, with a marker for each call.

Source: the chat templates of mistralai/Mistral-7B-Instruct-v0.3 and Mistral-Small-3.2-24B, and the
mistral-common tokenizer.
"""

import re

from router.text.markers import MarkerSearch, SpaceHold
from router.text.tools.call_list import CallList
from router.text.tools.call_object import CallState
from router.text.tools.events import (
    CallArguments,
    CallBegun,
    CallEnded,
    Content,
    ToolEvent,
    merged,
)
from router.text.tools.json_value import JsonValue

MARKER = "[TOOL_CALLS]"
_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?")
_MAX_HEAD = 256
"""Characters of a name and what may follow it; more of them are no call."""
_UNFINISHED_NAME = re.compile(r"[\s\w.\-\[\]]*")


class MistralParser:
    """Calls after a marker, text before it. White space before a call belongs to it."""

    def __init__(self) -> None:
        self._search = MarkerSearch(MARKER)
        self._space = SpaceHold()
        self._calls: CallList | _NamedCall | None = None
        self._called = False

    def feed(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text."""
        events: list[ToolEvent] = []
        rest: str | None = text
        while rest:
            if self._calls is not None:
                rest = self._feed_calls(rest, events)
                continue
            before, rest = self._search.push(rest)
            events.append(Content(self._space.push(before)))
            if rest is not None:
                self._calls = _NamedCall()
        return merged(events)

    def finish(self) -> list[ToolEvent]:
        """The output is over."""
        if self._calls is not None:
            return []
        text = self._space.push(self._search.flush())
        space = self._space.drop()
        return merged([Content(text if self._called else text + space)])

    def _feed_calls(self, text: str, events: list[ToolEvent]) -> str:
        for i, character in enumerate(text):
            calls = self._calls
            if isinstance(calls, _NamedCall) and character == "[" and not calls.raw.strip():
                calls = self._calls = CallList()
            assert calls is not None
            events += calls.take(character)
            self._called |= calls.announced
            if calls.state is CallState.READING:
                continue
            self._calls = None
            if calls.announced:
                self._space.drop()
            else:
                events.append(Content(self._space.drop() + MARKER + calls.raw))
            return text[i + 1 :]
        return ""


class _NamedCall:
    """Reads a name and its arguments."""

    def __init__(self) -> None:
        self.raw = ""
        self.state = CallState.READING
        self.announced = False
        self._arguments: JsonValue | None = None

    def take(self, character: str) -> list[ToolEvent]:
        self.raw += character
        events: list[ToolEvent] = []
        if self._arguments is None:
            name = _NAME.fullmatch(self.raw[:-1]) if character == "{" else None
            if name is None:
                if len(self.raw) > _MAX_HEAD or not _UNFINISHED_NAME.fullmatch(self.raw):
                    self.state = CallState.BROKEN
                return []
            self._arguments = JsonValue()
            self.announced = True
            events.append(CallBegun(name[1]))
        events.append(CallArguments(character))
        if self._arguments.take(character):
            self.state = CallState.DONE
            events.append(CallEnded())
        return events
