from collections.abc import Sequence
from typing import Any

from core.finish import FinishReason
from core.tokens import TokenLogprobs
from router.api.logprobs import chat_logprobs, completion_logprobs
from router.api.output import Output, OutputRules, Piece
from router.generation import GenerationEnd, Token
from tests.support.router_api import EOS, byte_text, byte_tokenizer

TEXT = byte_text()
END = GenerationEnd(finish_reason=FinishReason.STOP, matched_stop=EOS)
LENGTH = GenerationEnd(finish_reason=FinishReason.LENGTH)


def _output(**rules: Any) -> Output:
    stop_ids = rules.pop("stop_ids", {EOS})
    return Output(
        TEXT.detokeniser(),
        OutputRules(stop_ids=frozenset(stop_ids), eos_ids=frozenset({EOS}), **rules),
    )


def _tokens(text: str) -> list[Token]:
    ids = byte_tokenizer(extra=()).encode(text).ids
    return [Token(i, token_id, TokenLogprobs(-1.0)) for i, token_id in enumerate(ids)]


def _run(output: Output, tokens: Sequence[Token], end: GenerationEnd = END) -> Piece:
    whole = Piece()
    for token in tokens:
        whole.append(output.take([token]))
        if output.stopped:
            return whole
    whole.append(output.close(end))
    return whole


def test_end_of_sequence_counts_but_has_no_text() -> None:
    output = _output()
    piece = _run(output, [*_tokens("ok"), Token(2, EOS)])
    assert (piece.content, output.num_tokens) == ("ok", 3)
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_length_is_the_reason_when_the_limit_was_reached() -> None:
    output = _output()
    _run(output, _tokens("ok"), LENGTH)
    assert (output.finish_reason, output.stop_reason) == ("length", None)


def test_stop_id_is_hidden_and_named_unless_it_is_to_be_included() -> None:
    x = byte_tokenizer().token_to_id("x")
    ended = GenerationEnd(finish_reason=FinishReason.STOP, matched_stop=x)
    output = _output(stop_ids={EOS, x})
    assert _run(output, _tokens("abx"), ended).content == "ab"
    assert output.stop_reason == x
    assert (
        _run(_output(stop_ids={EOS, x}, include_stop=True), _tokens("abx"), ended).content == "abx"
    )


def test_stop_string_across_tokens_ends_it_and_counts_up_to_there() -> None:
    output = _output(stops=("b c",))
    piece = _run(output, _tokens("a b c d"))
    assert (piece.content, output.num_tokens) == ("a ", 5)
    assert (output.finish_reason, output.stop_reason) == ("stop", "b c")
    assert output.end is None


def test_tokens_after_a_stop_string_in_one_turn_are_ignored() -> None:
    output = _output(stops=("b",))
    assert output.take(_tokens("abc")).content == "a"
    assert output.num_tokens == 2


def test_held_text_is_released_at_the_end() -> None:
    output = _output(stops=("STOP",))
    assert _run(output, _tokens("go ST")).content == "go ST"
    assert output.stop_reason is None


def test_stop_strings_wait_for_min_tokens() -> None:
    output = _output(stops=("b",), min_tokens=3)
    assert _run(output, _tokens("abcab")).content == "abca"


def test_unfinished_character_at_the_end_becomes_one_replacement() -> None:
    assert _run(_output(), _tokens("é")[:1], LENGTH).content == "\ufffd"


def test_logprobs_have_one_entry_per_token_with_exact_bytes() -> None:
    output = _output(logprobs=True)
    tokens = [
        Token(i, token.token_id, TokenLogprobs(-1.0, ((token.token_id, -1.0), (EOS, -2.0))))
        for i, token in enumerate(_tokens("aé"))
    ]
    content = chat_logprobs(_run(output, tokens).tokens, TEXT.token_bytes)["content"]
    assert [entry["bytes"] for entry in content] == [[97], [0xC3], [0xA9]]
    assert [entry["token"] for entry in content] == ["a", "\ufffd", "\ufffd"]
    assert content[0]["top_logprobs"][1]["token"] == "<|im_end|>"


def test_completion_logprobs_are_parallel_and_keep_partial_tokens_apart() -> None:
    output = Output(TEXT.detokeniser(), OutputRules(logprobs=True), offset=10)
    tokens = [
        Token(i, token.token_id, TokenLogprobs(float("-inf"), ((token.token_id, -1.0),)))
        for i, token in enumerate(_tokens("aéb"))
    ]
    found = completion_logprobs(_run(output, tokens).tokens, TEXT.token_bytes)
    assert found["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert found["text_offset"] == [10, 11, 11, 12]
    assert found["token_logprobs"] == [-9999.0] * 4
    assert list(found["top_logprobs"][1]) == ["bytes:\\xc3"]
