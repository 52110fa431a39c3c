"""What every form of answer has in common: its interface, its usage, its events.

One Answer per request, made by the request's dialect and driven by router/api/generate.py: either
`whole`, or `opening`, `chunk` and `closing` for each choice and then `ending`, or `failure`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from router.api.choice import Choice, EndedChoice
from router.api.errors import ErrorAnswer
from router.api.logprobs import TokenBytes
from router.api.output import Piece

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache; None while not known."""
    reasoning_tokens: int = 0

    def json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        known = self.cached_tokens is not None
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens} if known else None,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


def usage_of(choice: Choice) -> Usage:
    """What one choice has used so far."""
    output = choice.output
    return Usage(
        prompt_tokens=len(choice.prompt.token_ids),
        completion_tokens=output.num_tokens,
        cached_tokens=output.end.cached_tokens if output.end is not None else None,
        reasoning_tokens=output.num_reasoning,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFacts:
    """What an answer says besides its choices."""

    answer_id: str
    created: int
    """Seconds since the epoch."""
    model: str
    """Name that clients use."""
    token_bytes: TokenBytes
    tenant: str = ""
    """Who may read it later, where it is kept."""


class Answer(Protocol):
    """The bytes of one answer."""

    def opening(self, choice: Choice) -> bytes:
        """Events before the first piece of a choice; empty where there is nothing to say.

        Asked for when there is a piece, so what is said of the prompt is known.
        """
        ...

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """Events for a piece of one choice's output."""
        ...

    def closing(self, choice: Choice) -> bytes:
        """Events that say why a choice ended."""
        ...

    def ending(self, usage: Usage) -> bytes:
        """Events after the last choice has ended."""
        ...

    def failure(self, error: ErrorAnswer) -> bytes:
        """Events that end a stream which can't go on."""
        ...

    def whole(self, choices: Sequence[EndedChoice], usage: Usage) -> bytes:
        """The answer to a request that does not stream."""
        ...


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % orjson.dumps(data)
