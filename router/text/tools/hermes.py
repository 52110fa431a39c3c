r"""The format of Hermes and Qwen: `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`.

Source: the chat templates of NousResearch/Hermes-2-Pro and Qwen/Qwen2.5 and Qwen3.
"""

from router.text.markers import MarkerSearch, SpaceHold
from router.text.tools.call_object import CallObject, CallState
from router.text.tools.events import Content, ToolEvent, merged

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser:
    """Calls between markers, text before and between them.

    What stands between markers and is no call is text. White space before a call belongs to it.
    """

    def __init__(self) -> None:
        self._search = MarkerSearch(BEGIN)
        self._space = SpaceHold()
        self._call: CallObject | None = None
        self._ending: MarkerSearch | None = None
        self._called = False

    def feed(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text."""
        events: list[ToolEvent] = []
        rest: str | None = text
        while rest:
            if self._call is not None:
                rest = self._feed_call(self._call, rest, events)
            elif self._ending is not None:
                _, rest = self._ending.push(rest)
                if rest is not None:
                    self._ending = None
            else:
                before, rest = self._search.push(rest)
                events.append(Content(self._space.push(before)))
                if rest is not None:
                    self._call = CallObject()
        return merged(events)

    def finish(self) -> list[ToolEvent]:
        """The output is over."""
        if self._call is not None or self._ending is not None:
            return []
        text = self._space.push(self._search.flush())
        space = self._space.drop()
        return merged([Content(text if self._called else text + space)])

    def _feed_call(self, call: CallObject, text: str, events: list[ToolEvent]) -> str:
        for i, character in enumerate(text):
            events += call.take(character)
            if call.announced and not self._called:
                self._called = True
            if call.state is CallState.READING:
                continue
            self._call = None
            if call.announced:
                self._space.drop()
                self._ending = MarkerSearch(END)
            else:
                events.append(Content(self._space.drop() + BEGIN + call.raw))
            return text[i + 1 :]
        return ""
