"""What everything needs that looks for fixed strings in text that arrives in pieces."""


def unfinished_start(text: str, marker: str) -> int:
    """Where the longest suffix of `text` that begins `marker` starts; its length if none does."""
    start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while start >= 0:
        if marker.startswith(text[start:]):
            return start
        start = text.find(marker[0], start + 1)
    return len(text)


class MarkerSearch:
    """Looks for one marker. What it lets through does not depend on how the text was cut."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Take the next piece.

        Returns:
            Text before the marker, and what follows it; None for the second while it has not come.
            After it came, the search starts anew.
        """
        text = self._held + piece
        before, found, after = text.partition(self._marker)
        if found:
            self._held = ""
            return before, after
        cut = unfinished_start(text, self._marker)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held back because it could have become the marker."""
        text, self._held = self._held, ""
        return text


class SpaceHold:
    """Lets white space through only when something else follows it."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece; returns it without the white space at its end."""
        text = self._held + piece
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def drop(self) -> str:
        """Forget the white space that is held, and return it."""
        held, self._held = self._held, ""
        return held
