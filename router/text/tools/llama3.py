"""The format of Llama 3.1 and later: `{"name": ..., "parameters": {...}}` is the whole message.

Several calls are separated by semicolons; `<|python_tag|>` may stand before the first. Nothing else
marks a call, so only an object that names a known function is one.

Source: the chat templates of meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-3B-Instruct.
"""

from collections.abc import Container
from enum import Enum, auto

from router.text.markers import MarkerSearch, SpaceHold
from router.text.tools.call_object import CallObject, CallState
from router.text.tools.events import Content, ToolEvent, merged

TAG = "<|python_tag|>"


class _At(Enum):
    START = auto()
    """Nothing but white space so far, or since the marker."""
    TEXT = auto()
    CALL = auto()
    BETWEEN = auto()
    """A call has ended."""


class Llama3Parser:
    """Calls at the start of the output, or after the marker."""

    def __init__(self, functions: Container[str]) -> None:
        self._functions = functions
        self._at = _At.START
        self._search = MarkerSearch(TAG)
        self._space = SpaceHold()
        self._held = ""
        """White space and separators that belong to a call if one follows."""
        self._call = self._new_call()

    def feed(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text."""
        events: list[ToolEvent] = []
        rest = text
        while rest:
            match self._at:
                case _At.START:
                    rest = self._find_start(rest, "")
                case _At.BETWEEN:
                    rest = self._find_start(rest, ";,")
                case _At.CALL:
                    rest = self._feed_call(rest, events)
                case _At.TEXT:
                    rest = self._feed_text(rest, events)
        return merged(events)

    def finish(self) -> list[ToolEvent]:
        """The output is over."""
        match self._at:
            case _At.CALL if not self._call.announced:
                return merged([Content(self._held + self._call.raw)])
            case _At.START:
                return merged([Content(self._held)])
            case _At.TEXT:
                text = self._space.push(self._held + self._search.flush())
                return merged([Content(text + self._space.drop())])
            case _:
                return []

    def _new_call(self) -> CallObject:
        return CallObject(lambda name: name in self._functions)

    def _find_start(self, text: str, separators: str) -> str:
        for i, character in enumerate(text):
            if character.isspace() or character in separators:
                self._held += character
                continue
            self._at = _At.CALL if character == "{" else _At.TEXT
            return text[i:]
        return ""

    def _feed_call(self, text: str, events: list[ToolEvent]) -> str:
        for i, character in enumerate(text):
            events += self._call.take(character)
            match self._call.state:
                case CallState.READING:
                    continue
                case CallState.BROKEN if not self._call.announced:
                    events.append(Content(self._held + self._call.raw))
                    self._at = _At.TEXT
                case CallState.DONE | CallState.BROKEN:
                    self._at = _At.BETWEEN
            self._held = ""
            self._call = self._new_call()
            return text[i + 1 :]
        return ""

    def _feed_text(self, text: str, events: list[ToolEvent]) -> str:
        before, after = self._search.push(text)
        events.append(Content(self._space.push(self._held + before)))
        self._held = ""
        if after is None:
            return ""
        self._held = self._space.drop()
        self._at = _At.START
        return after
