"""Turns a growing list of token ids into text, piece by piece.

Invariants: the pieces of `feed` and the last one of `finish` concatenate to the decoding of all
ids; no piece but the last ends in the middle of a character; a token costs O(1).

One exception to the first: where sentencepiece's byte pieces do not form UTF-8, the tokenizers
library replaces a whole run of them after the fact, including characters that were complete. Pieces
already sent can't be recalled, so here only the bytes that are wrong are replaced.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from router.text.vocabulary import Vocabulary

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens before the output that a decoder without a table may look back at."""
MAX_HELD_TOKENS = 8
"""A character has at most 4 bytes; longer than this, what looks unfinished never will be."""


class Detokeniser(Protocol):
    """Decodes one sequence."""

    def feed(self, token_id: int) -> str:
        """Text that this token completes, empty while a character is unfinished."""
        ...

    def finish(self) -> str:
        """What was held back: U+FFFD for the bytes of an unfinished character."""
        ...


class TableDetokeniser:
    """For vocabularies whose tokens have bytes of their own."""

    def __init__(self, vocabulary: Vocabulary, *, skipped: frozenset[int], continues: bool) -> None:
        """Args: skipped are the ids without text; continues, that the text has begun before."""
        self._bytes = vocabulary.token_bytes
        self._texts = vocabulary.texts
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unfinished = False
        """The decoder holds bytes of a character."""
        self._strip_next = vocabulary.strips_first_space and not continues

    def feed(self, token_id: int) -> str:
        """Text that this token completes."""
        if token_id in self._skipped:
            return ""
        text = None if self._unfinished else self._texts[token_id]
        if text is None:
            text = self._decoder.decode(self._bytes(token_id))
            self._unfinished = bool(self._decoder.getstate()[0])
        return self._stripped(text) if self._strip_next else text

    def finish(self) -> str:
        """What was held back."""
        text = self._decoder.decode(b"", final=True)
        return self._stripped(text) if self._strip_next else text

    def _stripped(self, text: str) -> str:
        if text:
            self._strip_next = False
        return text.removeprefix(" ")


class WindowDetokeniser:
    """For any other decoder: decodes a short window twice, without and with the new tokens.

    Source: the two-offset scheme of text-generation-inference (Apache-2.0), with a bound on how
    long a trailing U+FFFD is taken for an unfinished character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        context: Sequence[int],
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """Args: shown are special tokens that have text although the others have none."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._shown = shown
        self._window = list(context[-CONTEXT_TOKENS:])
        self._num_read = len(self._window)

    def feed(self, token_id: int) -> str:
        """Text that this token completes."""
        if token_id in self._shown:
            return self._cut_at(token_id)
        self._window.append(token_id)
        before, after = self._decode(self._num_read), self._decode(len(self._window))
        held = len(self._window) - self._num_read
        if after.endswith(REPLACEMENT) and held < MAX_HELD_TOKENS:
            return ""
        if len(after) > len(before):
            del self._window[: self._num_read]
            self._num_read = len(self._window)
        elif held >= MAX_HELD_TOKENS:  # tokens without text
            del self._window[self._num_read :]
        return after[len(before) :]

    def finish(self) -> str:
        """What was held back."""
        return self._decode(len(self._window))[len(self._decode(self._num_read)) :]

    def _cut_at(self, token_id: int) -> str:
        text = self.finish() + (self._tokenizer.id_to_token(token_id) or "")
        self._window.clear()
        self._num_read = 0
        return text

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._window[:end], skip_special_tokens=self._skip)
