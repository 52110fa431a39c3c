"""Parts what a model thinks from what it says.

Models that think aloud put it between `<think>` and `</think>` before the answer; some chat
templates write the opening marker themselves, at the end of the prompt.

Source: the chat templates of deepseek-ai/DeepSeek-R1 and Qwen/Qwen3.
"""

from dataclasses import dataclass
from enum import Enum, auto

from router.text.markers import MarkerSearch, SpaceHold

BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Parted:
    """What a piece of text adds to either side."""

    reasoning: str = ""
    content: str = ""


class _At(Enum):
    START = auto()
    """Only white space, or the start of the opening marker, so far."""
    REASONING = auto()
    ANSWER_START = auto()
    """White space between reasoning and answer."""
    ANSWER = auto()


def begins_in_reasoning(prompt: str) -> bool:
    """Whether an output that follows this prompt is reasoning from its first token on."""
    return prompt.rfind(BEGIN) > prompt.rfind(END)


class ReasoningSplit:
    """Parts one output. White space around either part is dropped; any cut gives the same."""

    def __init__(self, *, inside: bool) -> None:
        """Args: inside is True if the prompt has opened the reasoning."""
        self._at = _At.REASONING if inside else _At.START
        self._held = ""
        self._search = MarkerSearch(END)
        self._space = SpaceHold()
        self._begun = False

    @property
    def inside(self) -> bool:
        """True while what comes is reasoning."""
        return self._at is _At.REASONING

    @property
    def undecided(self) -> bool:
        """True while the text may still turn out to be either."""
        return self._at is _At.START

    def feed(self, text: str) -> Parted:
        """Take the next piece of text."""
        reasoning = ""
        if self._at is _At.START:
            text = self._find_start(text)
        if self._at is _At.REASONING and text:
            before, after = self._search.push(text)
            reasoning = self._thought(before)
            text = ""
            if after is not None:
                self._space.drop()
                self._at = _At.ANSWER_START
                text = after
        if self._at is _At.ANSWER_START:
            text = text.lstrip()
            if text:
                self._at = _At.ANSWER
        return Parted(reasoning, text)

    def finish(self) -> Parted:
        """The output is over."""
        if self._at is _At.REASONING:
            return Parted(reasoning=self._thought(self._search.flush()))
        held, self._held = self._held, ""
        return Parted(content=held)

    def _find_start(self, text: str) -> str:
        """Hold text back until it can't become the opening marker; what goes on otherwise."""
        self._held += text
        begun = self._held.lstrip()
        if BEGIN.startswith(begun) and begun != BEGIN:
            return ""
        text, self._held = self._held, ""
        if begun.startswith(BEGIN):
            self._at = _At.REASONING
            return begun.removeprefix(BEGIN)
        self._at = _At.ANSWER
        return text

    def _thought(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return self._space.push(text)
