"""A grammar over the fake model's tokens, and a compiler that compiles when it is told to.

Which tokens a rule allows depends on all tokens before, so that a token which is left out, repeated
or accepted too early changes the output or ends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from engine.grammar.backend import CompiledGrammar, GrammarFailure, Matcher, Words, mask_of
from engine.grammar.compiler import GrammarCompiler

END = 0
NUM_TOKENS = 97


class ReadMask:
    """A TokenMask that was read when its step was submitted."""

    def __init__(self, words: Words) -> None:
        self._words = words.copy()

    def words(self) -> Words:
        return self._words


def allowed_by(words: Words) -> set[int]:
    """The ids whose bits are set."""
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@dataclass(frozen=True)
class Rule:
    """So many tokens, each from a class that the ones before decide; then the end and nothing else.

    From half of its length on, the end is allowed too.
    """

    length: int
    fails_at: int = -1

    def allowed(self, output: Sequence[int]) -> set[int]:
        if len(output) >= self.length or END in output:
            return {END}
        state = (sum(output) + len(output)) % 5
        allowed = {token for token in range(1, NUM_TOKENS) if token % 5 == state}
        return allowed | ({END} if 2 * len(output) >= self.length else set())


def structure(length: int, *, fails_at: int = -1) -> StructuredOutput:
    """What asks for a rule."""
    return StructuredOutput(kind="regex", definition=f"{length},{fails_at}")


BAD = StructuredOutput(kind="regex", definition="bad")


def rule_of(structured: StructuredOutput) -> Rule:
    length, fails_at = structured.definition.split(",")
    return Rule(int(length), int(fails_at))


class RuleBackend:
    """Implements GrammarBackend."""

    def __init__(self) -> None:
        self.compiled: list[StructuredOutput] = []

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        self.compiled.append(structured)
        if structured.definition == "broken":
            raise RuntimeError("a bug")
        if structured == BAD:
            raise InvalidRequestError("There is no such rule.", param="structured")
        return _RuleGrammar(rule_of(structured))


class _RuleGrammar:
    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def start(self) -> Matcher:
        return _RuleMatcher(self._rule)


class _RuleMatcher:
    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._output: list[int] = []

    def accept(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if token_id not in self._rule.allowed(self._output):
                raise GrammarFailure(f"{token_id} after {self._output}")
            self._output.append(token_id)

    def fill(self, words: Words) -> None:
        if len(self._output) == self._rule.fails_at:
            raise GrammarFailure("too complex")
        words[:] = mask_of(self._rule.allowed(self._output), NUM_TOKENS)


class HeldCompiler(GrammarCompiler):
    """Compiles nothing before `release`, and everything in this thread then."""

    def __init__(self, **options: object) -> None:
        self.backend = RuleBackend()
        super().__init__(self.backend, num_threads=0, **options)  # type: ignore[arg-type]

    def release(self) -> None:
        while not self._jobs.empty():
            self.compile_next()


def ready_compiler(*structures: StructuredOutput) -> HeldCompiler:
    """One that has compiled these already."""
    compiler = HeldCompiler()
    for structured in structures:
        compiler.ticket(structured)
    compiler.release()
    return compiler
