"""What each token id contributes to the output, in bytes.

The detokeniser and the logprobs of the API read this. For the two decoders that served models use
(byte-level BPE, and sentencepiece pieces with byte fallback) a token's bytes do not depend on its
neighbours, so decoding is a table lookup and a UTF-8 decoder; other decoders have no such table and
`exact` is False for them.

Source: the decoders of the Hugging Face tokenizers library; GPT-2's byte-to-character table.
"""

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_PIECE = "\u2581"


def byte_characters() -> dict[str, int]:
    """Map each character of a byte-level BPE vocabulary to the byte it stands for.

    Source: GPT-2: printable Latin-1 bytes stand for themselves, the others are moved up from
    U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + i): byte for i, byte in enumerate(moved)})
    return table


class Vocabulary:
    """Bytes of single tokens, looked up once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None
        self._tokenizer = tokenizer
        self._characters = byte_characters() if _is_byte_level(state) else None
        pieces, self.strips_first_space = _sentencepiece(state)
        self.exact = self._characters is not None or pieces
        """True if the decoded text is the concatenation of the tokens' bytes."""
        self.special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._bytes: dict[int, bytes] = {}
        self.texts = _Texts(self.token_bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, specials included; empty for an id that the tokenizer has not."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute(token_id)
        return known

    def _compute(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._characters is not None:
            try:
                return bytes([self._characters[character] for character in token])
            except KeyError:  # an added token is spelt as it is
                return token.encode()
        if self.exact:
            byte = _BYTE_PIECE.fullmatch(token)
            if byte:
                return bytes([int(byte[1], 16)])
            return token.replace(_SPACE_PIECE, " ").encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


class _Texts(dict[int, str | None]):
    """Text of single tokens; None if its bytes begin or end within a character."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        return self.setdefault(token_id, text)


def _is_byte_level(decoder: dict[str, object] | None) -> bool:
    return decoder is not None and decoder["type"] == "ByteLevel"


def _sentencepiece(decoder: dict[str, object] | None) -> tuple[bool, bool]:
    """Whether the decoder is sentencepiece's with byte fallback, and strips one leading space."""
    if decoder is None or decoder["type"] != "Sequence":
        return False, False
    steps = decoder["decoders"]
    pieces = [
        {"type": "Replace", "pattern": {"String": _SPACE_PIECE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return steps in (pieces, [*pieces, strip]), steps == [*pieces, strip]
