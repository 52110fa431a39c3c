"""What a tool parser makes of text, and its interface.

router/text/message.py drives one parser per output. Invariant of every parser: the events of any
two cuts of the same text say the same (texts and argument fragments joined), and text that belongs
to a call is in no Content.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a function; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the current call's arguments, which together are a JSON object."""

    fragment: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The current call is complete."""


ToolEvent = Content | CallBegun | CallArguments | CallEnded


class ToolParser(Protocol):
    """Finds the calls in one output."""

    def feed(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text."""
        ...

    def finish(self) -> list[ToolEvent]:
        """The output is over; a call that was not complete stays as far as it came."""
        ...


def merged(events: Iterable[ToolEvent]) -> list[ToolEvent]:
    """Join neighbours of a kind, and drop the empty ones."""
    result: list[ToolEvent] = []
    for event in events:
        last = result[-1] if result else None
        match event, last:
            case Content(""), _:
                pass
            case CallArguments(""), _:
                pass
            case Content(text), Content(before):
                result[-1] = Content(before + text)
            case CallArguments(fragment), CallArguments(before):
                result[-1] = CallArguments(before + fragment)
            case _:
                result.append(event)
    return result
