"""Calls written as a JSON array of objects, and as such an array alone.

The array alone is what a constraint makes a model write when it has to call a function; within a
format it may stand after a marker.
"""

from router.text.tools.call_object import CallObject, CallState
from router.text.tools.events import Content, ToolEvent, merged


class CallList:
    """Reads one array of calls, from its opening bracket on."""

    def __init__(self) -> None:
        self.raw = ""
        """All that was taken."""
        self.state = CallState.READING
        self.announced = False
        """True once an event said that something in it is a call."""
        self._call: CallObject | None = None
        self._open = False

    def take(self, character: str) -> list[ToolEvent]:
        """Take the next character. Not to be called once it is DONE or BROKEN."""
        self.raw += character
        if self._call is not None:
            events = self._call.take(character)
            self.announced |= self._call.announced
            if self._call.state is CallState.BROKEN:
                self.state = CallState.BROKEN
            elif self._call.state is CallState.DONE:
                self._call = None
            return events
        if character == "[" and not self._open:
            self._open = True
        elif character == "{" and self._open:
            self._call = CallObject()
            return self._call.take(character)
        elif character == "]" and self._open:
            self.state = CallState.DONE
        elif not (character.isspace() or (character == "," and self._open)):
            self.state = CallState.BROKEN
        return []


class CallListParser:
    """For an output that is an array of calls and nothing else."""

    def __init__(self) -> None:
        self._list = CallList()

    def feed(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text."""
        events: list[ToolEvent] = []
        for i, character in enumerate(text):
            if self._list.state is CallState.READING:
                events += self._list.take(character)
                continue
            if self._is_text:
                events.append(Content(self._take_raw() + text[i:]))
            break
        else:
            if self._is_text:
                events.append(Content(self._take_raw()))
        return merged(events)

    @property
    def _is_text(self) -> bool:
        return self._list.state is CallState.BROKEN and not self._list.announced

    def _take_raw(self) -> str:
        raw, self._list.raw = self._list.raw, ""
        return raw

    def finish(self) -> list[ToolEvent]:
        """The output is over."""
        return []
