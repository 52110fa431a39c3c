"""From the text of an output to the parts of a message: reasoning, content, function calls.

One parser per output, driven by router/api/output.py.
"""

import secrets
import string
from dataclasses import dataclass, field

from router.text.reasoning import ReasoningSplit
from router.text.tools.events import (
    CallArguments,
    CallBegun,
    CallEnded,
    Content,
    ToolEvent,
    ToolParser,
)

_SHORT_ID_CHARS = 9


@dataclass(slots=True)
class CallDelta:
    """What a piece of the output adds to one call."""

    index: int
    """Of the call in its message."""
    call_id: str | None = None
    """Set where the call begins, together with the name."""
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class MessageDelta:
    """What a piece of the output adds to its message."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def extend(self, other: "MessageDelta") -> None:
        """Append a later one."""
        self.content += other.content
        self.reasoning += other.reasoning
        for delta in other.calls:
            if self.calls and self.calls[-1].index == delta.index:
                self.calls[-1].arguments += delta.arguments
            else:
                self.calls.append(
                    CallDelta(delta.index, delta.call_id, delta.name, delta.arguments)
                )


class MessageParser:
    """Takes the text of one output."""

    def __init__(
        self,
        *,
        reasoning: ReasoningSplit | None = None,
        hold_reasoning: bool = False,
        tools: ToolParser | None = None,
        short_ids: bool = False,
        one_call: bool = False,
    ) -> None:
        """Put the parts together.

        Args:
            reasoning: None leaves reasoning in the content.
            hold_reasoning: reasoning comes in one piece, when it is complete.
            tools: None leaves calls in the content.
            short_ids: see ToolFormat.
            one_call: no second call is wanted.
        """
        self._reasoning = reasoning
        self._hold_reasoning = hold_reasoning
        self._tools = tools
        self._short_ids = short_ids
        self._one_call = one_call
        self._thought = ""
        self.num_calls = 0
        self.complete = False
        """True once nothing more is wanted."""

    @property
    def thinking(self) -> bool:
        """True while what comes is reasoning."""
        return self._reasoning is not None and self._reasoning.inside

    @property
    def undecided(self) -> bool:
        """True while it can't be said yet whether the text is reasoning."""
        return self._reasoning is not None and self._reasoning.undecided

    def feed(self, text: str) -> MessageDelta:
        """Take the next piece of text."""
        delta = MessageDelta()
        if self.complete:
            return delta
        if self._reasoning is not None:
            parted = self._reasoning.feed(text)
            self._think(parted.reasoning, delta)
            text = parted.content
        self._say(text, delta)
        return delta

    def finish(self) -> MessageDelta:
        """The output is over."""
        delta = MessageDelta()
        if self.complete:
            return delta
        if self._reasoning is not None:
            parted = self._reasoning.finish()
            self._think(parted.reasoning, delta)
            delta.reasoning += self._thought
            self._thought = ""
            self._say(parted.content, delta)
        if self._tools is not None:
            self._take(self._tools.finish(), delta)
        return delta

    def _say(self, text: str, delta: MessageDelta) -> None:
        if self._tools is None:
            delta.content += text
        else:
            self._take(self._tools.feed(text), delta)

    def _think(self, text: str, delta: MessageDelta) -> None:
        if not self._hold_reasoning:
            delta.reasoning += text
            return
        self._thought += text
        if not self.thinking:
            delta.reasoning += self._thought
            self._thought = ""

    def _take(self, events: list[ToolEvent], delta: MessageDelta) -> None:
        for event in events:
            match event:
                case Content(text):
                    delta.content += text
                case CallBegun(name):
                    delta.calls.append(CallDelta(self.num_calls, self._new_id(), name))
                    self.num_calls += 1
                case CallArguments(fragment):
                    self._take_arguments(fragment, delta)
                case CallEnded() if self._one_call:
                    self.complete = True
                    return
                case CallEnded():
                    pass

    def _take_arguments(self, fragment: str, delta: MessageDelta) -> None:
        index = self.num_calls - 1
        if delta.calls and delta.calls[-1].index == index:
            delta.calls[-1].arguments += fragment
        else:
            delta.calls.append(CallDelta(index, arguments=fragment))

    def _new_id(self) -> str:
        if not self._short_ids:
            return f"call_{secrets.token_hex(12)}"
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(_SHORT_ID_CHARS))
