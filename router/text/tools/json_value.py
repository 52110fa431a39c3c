"""Finds the end of a JSON value, character by character."""


class JsonValue:
    """One value that is being read. Says where it ends; does not check that it is well formed."""

    def __init__(self) -> None:
        self.text = ""
        """What was taken of it."""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def nested(self) -> bool:
        """True if it is an object or an array."""
        return self.text[:1] in ("{", "[")

    def take(self, character: str) -> bool:
        """Take its next character; True if that was its last one.

        A number or a word has no last character: see `ends_before`.
        """
        self.text += character
        if self._in_string:
            self._take_in_string(character)
            return not self._in_string and self._depth == 0
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def ends_before(self, character: str) -> bool:
        """True if the value is a number or a word, and this character is no part of it."""
        bare = bool(self.text) and not self._in_string and self._depth == 0
        return bare and (character in ",}]" or character.isspace())

    def _take_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
