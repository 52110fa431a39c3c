"""What the engine asks of a library that knows grammars. One backend serves one model.

Masks are rows of bits, as both libraries write them: token t may follow if bit t % 32 of word
t // 32 is set. Ends of output are tokens like any other: allowed once the grammar is complete.
"""

import json
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput

Words = npt.NDArray[np.int32]
MAX_WHITESPACE = 32
"""Most white space between two parts of JSON: enough for a line break and sixteen levels of two
spaces. Without a limit a weak model may write white space until max_tokens ends it."""

ANY_OBJECT = '{"type": "object"}'
"""The schema behind `json_object`."""


class GrammarFailure(Exception):
    """A matcher can't go on: a limit of the library, or a token that the grammar does not allow."""


class Matcher(Protocol):
    """Where one output stands in its grammar. One thread uses it."""

    def accept(self, token_ids: list[int]) -> None:
        """Move past tokens.

        Raises:
            GrammarFailure: the grammar does not allow them; the matcher is of no more use.
        """

    def fill(self, words: Words) -> None:
        """Write which tokens may follow, [ceil(vocab_size / 32)]; no bits past the vocabulary.

        Raises:
            GrammarFailure: a limit was hit; the matcher is of no more use.
        """


class CompiledGrammar(Protocol):
    """A grammar over one vocabulary."""

    def start(self) -> Matcher:
        """A matcher at the beginning; takes microseconds."""


class GrammarBackend(Protocol):
    """Implemented by `llguidance_backend` and `xgrammar_backend`."""

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """Compile a definition. Called on any thread; may take long.

        Raises:
            InvalidRequestError: there is no such grammar; the message says why.
        """


def refusal(structured: StructuredOutput, reason: str) -> InvalidRequestError:
    """The answer to a definition that can't be compiled."""
    return InvalidRequestError(
        f"The {structured.kind} of the structured output can't be served: {reason.strip()}",
        param="structured",
    )


def choices(structured: StructuredOutput) -> list[str]:
    """The strings of a choice.

    Raises:
        InvalidRequestError: it is no list of strings.
    """
    try:
        found = json.loads(structured.definition)
    except ValueError as error:
        raise refusal(structured, f"{error}.") from error
    if not isinstance(found, list) or not found or not all(isinstance(c, str) and c for c in found):
        raise refusal(structured, "it must be a list of at least one string, none of them empty.")
    return found


def mask_of(token_ids: Iterable[int], vocab_size: int) -> Words:
    """The mask that allows those ids of the vocabulary."""
    bits = np.zeros(num_words(vocab_size) * 32, np.uint8)
    bits[[token_id for token_id in token_ids if token_id < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def num_words(vocab_size: int) -> int:
    """Length of a mask."""
    return -(-vocab_size // 32)
