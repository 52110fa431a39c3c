"""Answers in the shape of /v1/completions."""

from collections.abc import Sequence
from typing import Any

from router.api.answer import AnswerFacts
from router.api.choice import Choice
from router.api.logprobs import completion_logprobs
from router.api.openai_answer import OpenAiAnswer
from router.api.output import Piece, TokenText
from router.api.prompt_scores import echoed_logprobs
from router.api.requests import CompletionRequest


class CompletionAnswer(OpenAiAnswer):
    """An Answer whose choices are text."""

    def __init__(self, facts: AnswerFacts, request: CompletionRequest) -> None:
        super().__init__(facts, request)
        self._num_echoed = request.logprobs if request.echo else None

    def opening(self, choice: Choice) -> bytes:
        """The event with the echoed prompt, where there is one."""
        echoed = self._echoed(choice)
        if not choice.prompt.echo and not self._shows_ids and echoed is None:
            return b""
        return self._opened(choice, {"text": choice.prompt.echo}, echoed)

    def _object(self, stream: bool) -> str:
        return "text_completion"

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return completion_logprobs(tokens, self._token_bytes)

    def _echoed(self, choice: Choice) -> dict[str, Any] | None:
        if self._num_echoed is None or choice.scores is None:
            return None
        prompt, scores = choice.prompt, choice.scores.logprobs
        return echoed_logprobs(
            prompt.echo, prompt.token_ids, scores, self._num_echoed, self._token_bytes
        )

    def _whole_logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        echoed, output = self._echoed(choice), super()._whole_logprobs(choice, piece)
        if echoed is None or output is None:
            return echoed or output
        return {name: [*values, *output[name]] for name, values in echoed.items()}

    def _bodies(self, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.content}]

    def _no_body(self) -> dict[str, Any]:
        return {"text": ""}

    def _whole_body(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        text = choice.prompt.echo + piece.content
        return {"text": text, **self._prompt_logprobs(choice)}
