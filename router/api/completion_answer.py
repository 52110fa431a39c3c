"""Answers in the shape of /v1/completions."""

from collections.abc import Sequence
from typing import Any

from router.api.choice import Choice
from router.api.logprobs import completion_logprobs
from router.api.openai_answer import OpenAiAnswer
from router.api.output import Piece, TokenText


class CompletionAnswer(OpenAiAnswer):
    """An Answer whose choices are text."""

    def opening(self, choice: Choice) -> bytes:
        """The event with the echoed prompt, where there is one."""
        if not choice.prompt.echo and not self._shows_ids:
            return b""
        return self._opened(choice, {"text": choice.prompt.echo})

    def _object(self, stream: bool) -> str:
        return "text_completion"

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return completion_logprobs(tokens, self._token_bytes)

    def _bodies(self, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.content}]

    def _no_body(self) -> dict[str, Any]:
        return {"text": ""}

    def _whole_body(self, echo: str, piece: Piece) -> dict[str, Any]:
        return {"text": echo + piece.content}
