"""Grammars by llguidance: no compile step to speak of, and masks in tens of microseconds.

Most definitions take some 20 ms to build and tens of microseconds for one mask. What hostile ones
take is not bounded by its own limits: compiler.py and budget.py see to that.
"""

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLTokenizer, grammar_from, regex_to_lark

from core.sampling import StructuredOutput
from engine.grammar.backend import (
    ANY_OBJECT,
    MAX_WHITESPACE,
    CompiledGrammar,
    GrammarFailure,
    Matcher,
    Words,
    choices,
    refusal,
)

_WHITESPACE = rf"[ \n\t]{{0,{MAX_WHITESPACE}}}"
_ASCII_CLASSES = "dws"
r"""So that \d is a digit of ASCII, as in a JSON schema; to llguidance alone it is any script's."""
_QUIET = 0
MAX_PROPERTIES = 1000
"""Of one object in a schema. What they take to compile grows with the cube of their number."""


class LlguidanceBackend:
    """Implements GrammarBackend."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Read a vocabulary; 0.3 s for 49k tokens.

        Args:
            tokenizer_json: contents of a tokenizer.json.
            vocab_size: tokens that the model knows, padding included.
            eos_token_ids: at least one.

        Raises:
            ValueError: this is no vocabulary that llguidance can read.
        """
        self._tokenizer = LLTokenizer(
            _within(tokenizer_json, vocab_size),
            n_vocab=vocab_size,
            eos_token=list(eos_token_ids),
        )

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """See GrammarBackend."""
        matcher = LLMatcher(self._tokenizer, _grammar(structured), log_level=_QUIET)
        if not matcher.is_error():
            # The first mask builds tables of the lexer that all copies begin with.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(structured, matcher.get_error())
        return _Grammar(matcher)


def _within(tokenizer_json: str, vocab_size: int) -> str:
    """Leave out added tokens that the model does not know, as those of a sibling that sees images.

    Text tokens stay: text that others force is tokenised as the model's own tokenizer does it.
    """
    tokenizer = json.loads(tokenizer_json)
    added = tokenizer.get("added_tokens") or []
    tokenizer["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    return json.dumps(tokenizer)


def _grammar(structured: StructuredOutput) -> str:
    try:
        match structured.kind:
            case "json_object":
                return _from_schema(ANY_OBJECT)
            case "json_schema":
                return _from_schema(structured.definition)
            case "choice":
                return grammar_from("choice", json.dumps(choices(structured)))
            case "regex":
                pattern = regex_to_lark(structured.definition, _ASCII_CLASSES)
                return LLMatcher.grammar_from_lark(f"start: /{pattern}/")
            case "ebnf":
                return grammar_from("ebnf", structured.definition)
    except ValueError as error:
        raise refusal(structured, str(error)) from error


def _check_properties(schema: str) -> None:
    """Refuse objects of more properties than the library can bear: 8000 take it half a minute.

    Raises:
        ValueError: there is one.
    """
    try:
        left: list[Any] = [json.loads(schema)]
    except (ValueError, RecursionError):
        return  # the library says better what is wrong
    while left:
        value = left.pop()
        if isinstance(value, dict):
            properties = value.get("properties")
            if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
                raise ValueError(
                    f"an object has {len(properties)} properties, and at most {MAX_PROPERTIES} are "
                    "taken."
                )
            left += value.values()
        elif isinstance(value, list):
            left += value


def _from_schema(schema: str) -> str:
    _check_properties(schema)
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})


class _Grammar:
    """Implements CompiledGrammar by copying a matcher that never moves."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> Matcher:
        return _Matcher(self._matcher.deep_copy())


class _Matcher:
    """Implements Matcher."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token_ids: list[int]) -> None:
        # One by one: several at once may not be followed by the end.
        if not all(map(self._matcher.consume_token, token_ids)):
            raise self._failure()

    def fill(self, words: Words) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise self._failure()

    def _failure(self) -> GrammarFailure:
        # The whole grammar and the parser's state follow.
        return GrammarFailure(self._matcher.get_error().partition("\n<state>")[0])
