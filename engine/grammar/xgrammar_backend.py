"""Grammars by xgrammar: definitions take longer to compile, masks less time than llguidance's.

An extra of its own, since it brings transformers and triton with it.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from xgrammar import CompiledGrammar as Compiled
from xgrammar import Grammar, GrammarCompiler, GrammarMatcher, TokenizerInfo

from core.sampling import StructuredOutput
from engine.grammar.backend import (
    ANY_OBJECT,
    MAX_WHITESPACE,
    CompiledGrammar,
    GrammarFailure,
    Matcher,
    Words,
    choices,
    mask_of,
    refusal,
)


class XgrammarBackend:
    """Implements GrammarBackend."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Read a vocabulary; arguments and errors as those of LlguidanceBackend."""
        tokenizer_object = Tokenizer.from_str(tokenizer_json)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer_object
        )
        # To xgrammar a special token is the text that it is spelt with.
        added = tokenizer_object.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        usable = set(range(vocab_size)) - special | set(eos_token_ids)
        self._masks = _Masks(mask_of(usable, vocab_size), mask_of(eos_token_ids, vocab_size))
        info = TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=list(eos_token_ids)
        )
        # Whoever asks keeps what was compiled, and has a thread for each definition.
        self._compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """See GrammarBackend."""
        try:
            return _Grammar(self._compile(structured), self._masks)
        except (RuntimeError, ValueError) as error:
            # Before the reason it says when, and where in its own sources.
            reason = re.sub(r"^\[[^\]]*\] \S+:\d+: ", "", str(error))
            raise refusal(structured, reason) from error

    def _compile(self, structured: StructuredOutput) -> Compiled:
        match structured.kind:
            case "json_object":
                return self._compile_schema(ANY_OBJECT)
            case "json_schema":
                return self._compile_schema(structured.definition)
            case "regex":
                return self._compiler.compile_regex(structured.definition)
            case "choice":
                rule = " | ".join(map(json.dumps, choices(structured)))
                return self._compiler.compile_grammar(Grammar.from_ebnf(f"root ::= {rule}"))
            case "ebnf":
                return self._compiler.compile_grammar(Grammar.from_ebnf(structured.definition))

    def _compile_schema(self, schema: str) -> Compiled:
        # Not strict: what a schema says of further properties is what it means.
        return self._compiler.compile_json_schema(
            schema, strict_mode=False, max_whitespace_cnt=MAX_WHITESPACE
        )


class _Masks(NamedTuple):
    """Of a vocabulary."""

    usable: Words
    """Text, and ends of output."""
    ends: Words


class _Grammar:
    """Implements CompiledGrammar."""

    def __init__(self, compiled: Compiled, masks: _Masks) -> None:
        self._compiled = compiled
        self._masks = masks

    def start(self) -> Matcher:
        return _Matcher(GrammarMatcher(self._compiled), self._masks)


class _Matcher:
    """Implements Matcher."""

    def __init__(self, matcher: GrammarMatcher, masks: _Masks) -> None:
        self._matcher = matcher
        self._masks = masks

    def accept(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if not self._matcher.accept_token(token_id):
                raise GrammarFailure(f"token {token_id} does not fit.")

    def fill(self, words: Words) -> None:
        if self._matcher.is_terminated():
            words[:] = self._masks.ends
        else:
            self._matcher.fill_next_token_bitmask(words.reshape(1, -1))
            words &= self._masks.usable
