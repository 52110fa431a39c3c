"""Finds stop strings in text that arrives in pieces.

Invariant: what is let through does not depend on how the text was cut, and only the longest suffix
that could still become a stop string is held back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from router.text.markers import unfinished_start


@dataclass(frozen=True, slots=True)
class Passed:
    """Text to send now, and the stop string that ended the output, if one did."""

    text: str
    matched: str | None = None


class StopStrings:
    """Watches one sequence. Of several stop strings the one that is complete first wins."""

    def __init__(self, stops: Sequence[str], *, include_match: bool = False) -> None:
        """Watch for `stops`, none of them empty.

        Args:
            stops: strings that end the output.
            include_match: True sends the stop string itself too.
        """
        self._stops = tuple(stops)
        self._include_match = include_match
        self._held = ""

    def push(self, piece: str) -> Passed:
        """Take the next piece of text. Not to be called after a match."""
        text = self._held + piece
        first: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first[:2]):
                first = (start + len(stop), start, stop)
        if first is not None:
            end, start, stop = first
            self._held = ""
            return Passed(text[: end if self._include_match else start], stop)
        cut = min(unfinished_start(text, stop) for stop in self._stops)
        self._held = text[cut:]
        return Passed(text[:cut])

    def flush(self) -> str:
        """Text that was held back, once no more will come."""
        text, self._held = self._held, ""
        return text
