"""One sequence of a request for text: what it starts from, what runs it, what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from router.api.output import Output, Piece
from router.api.prompt_scores import PromptScores
from router.api.requests import TextRequest
from router.generation import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, ready to run."""

    token_ids: Sequence[int]
    echo: str = ""
    """Text that comes before the output in the answer."""
    continued: bool = False
    """True if the output goes on with the prompt's own text instead of starting a new one."""
    request: TextRequest | None = None
    """What was asked for this prompt, where the prompts of a request differ in it."""
    opens_reasoning: bool = False
    """True if the prompt leaves the model thinking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sequence of a request."""

    index: int
    prompt: Prompt
    request: GenerationRequest
    output: Output
    scores: PromptScores | None = None
    """Of the prompt, the same object for all its choices; None if not asked for."""


@dataclass(frozen=True, slots=True)
class EndedChoice:
    """A sequence that has ended, and all of its output."""

    choice: Choice
    piece: Piece
