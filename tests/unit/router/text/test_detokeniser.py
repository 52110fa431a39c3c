import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from router.text.detokeniser import MAX_HELD_TOKENS, REPLACEMENT
from router.text.processor import TextProcessor
from tests.support.router_api import byte_tokenizer, piece_tokenizer

BYTES = TextProcessor(byte_tokenizer(), None)
PIECES = TextProcessor(piece_tokenizer(), None)
UNSTRIPPED = TextProcessor(piece_tokenizer(strip=False), None)


def _other() -> Tokenizer:
    """A decoder that has no table of bytes."""
    tokenizer = piece_tokenizer()
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return tokenizer


OTHER = TextProcessor(_other(), None)
WORDS = range(259, 267)
"""Ids of the pieces of `piece_tokenizer` that are not single bytes."""


def _pieces(text: TextProcessor, ids: list[int], **kwargs: object) -> list[str]:
    detokeniser = text.detokeniser(**kwargs)  # type: ignore[arg-type]
    return [*(detokeniser.feed(token_id) for token_id in ids), detokeniser.finish()]


@given(st.lists(st.integers(0, 270), max_size=40), st.booleans())
def test_byte_level_pieces_concatenate_to_decode(ids: list[int], skip: bool) -> None:
    pieces = _pieces(BYTES, ids, skip_special_tokens=skip)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=40))
def test_byte_level_text_never_shows_half_a_character(text: str) -> None:
    ids = byte_tokenizer().encode(text).ids
    pieces = _pieces(BYTES, ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert sum(piece.count(REPLACEMENT) for piece in pieces) == text.count(REPLACEMENT)


@pytest.mark.parametrize("text", [PIECES, UNSTRIPPED])
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=3)), max_size=12))
def test_sentencepiece_pieces_concatenate_to_decode(
    text: TextProcessor, parts: list[int | str]
) -> None:
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [3 + byte for byte in part.encode()]
    assert "".join(_pieces(text, ids)) == text.decode(ids)


def test_sentencepiece_bad_byte_replaces_only_itself() -> None:
    complete, bad = [3 + byte for byte in "é".encode()], 3 + 0xFF
    assert _pieces(PIECES, [*complete, bad]) == ["", "é", REPLACEMENT, ""]


def test_sentencepiece_output_that_continues_a_text_keeps_its_space() -> None:
    hello = 259
    assert "".join(_pieces(PIECES, [hello, hello])) == "hello hello"
    assert "".join(_pieces(PIECES, [hello], context=[hello])) == " hello"


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_decoder_without_table_concatenates_to_decode(ids: list[int]) -> None:
    assert "".join(_pieces(OTHER, ids)) == OTHER.decode(ids)


def test_decoder_without_table_never_holds_more_than_its_bound() -> None:
    tokenizer = _other()
    tokenizer.add_tokens([REPLACEMENT])
    text = TextProcessor(tokenizer, None)
    odd = tokenizer.encode(REPLACEMENT).ids[-1]
    detokeniser = text.detokeniser()
    silent = 0
    for _ in range(50):
        silent = 0 if detokeniser.feed(odd) else silent + 1
        assert silent < MAX_HELD_TOKENS


def test_unfinished_character_is_replaced_at_the_end() -> None:
    first = byte_tokenizer().encode("é").ids[0]
    assert _pieces(BYTES, [first]) == ["", REPLACEMENT]


def test_id_without_token_has_no_text() -> None:
    assert _pieces(BYTES, [100_000]) == ["", ""]
    assert BYTES.token_bytes(100_000) == b""


def test_token_bytes_are_exact_for_parts_of_characters() -> None:
    ids = byte_tokenizer().encode("你").ids
    assert b"".join(BYTES.token_bytes(token_id) for token_id in ids) == "你".encode()
    assert PIECES.token_bytes(3 + 0xE4) == b"\xe4"
    assert PIECES.token_bytes(259) == b" hello"


def test_added_token_outside_the_byte_table_is_spelt_as_it_is() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a b>", "→x→"])
    text = TextProcessor(tokenizer, None)
    ids = tokenizer.encode("<a b>→x→").ids
    assert len(ids) == 2
    assert "".join(_pieces(text, ids)) == text.decode(ids) == "<a b>→x→"
