"""Prompts as people write them, text or token ids, turned into token ids; and tokens into text.

Used by engine/llm.py alone: workers are sent token ids by a router, which has its own.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeGuard

from core.errors import InvalidRequestError
from core.modelfile.added_tokens import apply_added_tokens
from core.modelfile.description import read_tokenizer
from core.modelfile.resolve import resolve_model

Prompt = str | Sequence[int]
"""Text, or token ids, [T]."""


class PromptReader:
    """A model's tokenizer, read when first needed: ids need none."""

    def __init__(self, model: str) -> None:
        """`model`: as in `EngineConfig`."""
        self._model = model

    @cached_property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`.

        Raises:
            ConfigError: the model has none in the form of a tokenizer.json, or it can't be read.
        """
        files = read_tokenizer(resolve_model(self._model))
        apply_added_tokens(files.tokenizer, files.special_tokens, files.config)
        return files.tokenizer

    def token_ids(self, prompt: Prompt, position: int) -> Sequence[int]:
        """Token ids of one prompt; `position` is its place among all, for the error.

        Raises:
            InvalidRequestError: it is neither text nor token ids.
            ConfigError: it is text, and the model has no tokenizer.
        """
        if isinstance(prompt, str):
            encoded: list[int] = self.tokenizer.encode(prompt).ids
            return encoded
        if _are_ids(prompt):
            return prompt
        raise InvalidRequestError(
            f"Prompt {position} must be text or a list of token ids, got "
            f"{type(prompt).__name__}. Several prompts go in one list: "
            "generate([prompt, prompt]).",
            param="prompts",
        )

    def text(self, token_ids: Sequence[int]) -> str:
        """What tokens say, special ones left out."""
        text: str = self.tokenizer.decode(list(token_ids))
        return text


def _are_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    return isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt)
