"""What chat completions and completions share: choices, chunks, a usage at the end.

A stream's plain chunk is a constant head, the text, and a constant tail; only the text is encoded
per turn.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import orjson

from router.api.answer import DONE, AnswerFacts, Usage, event, usage_of
from router.api.choice import Choice, EndedChoice
from router.api.errors import ErrorAnswer
from router.api.output import Piece, TokenText
from router.api.prompt_scores import prompt_logprobs
from router.api.requests import GenerateRequest

_MARK = "\x00"
_MARK_JSON = orjson.dumps(_MARK)


class OpenAiAnswer(ABC):
    """An Answer; the subclasses know the names of a form's fields."""

    def __init__(self, facts: AnswerFacts, request: GenerateRequest) -> None:
        self._facts = facts
        self._token_bytes = facts.token_bytes
        options = request.stream_options
        self._usage_at_end = options.include_usage
        self._usage_always = options.include_usage and options.continuous_usage_stats
        self._shows_ids = request.return_token_ids
        self._num_prompt_logprobs = request.prompt_logprobs
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    @abstractmethod
    def opening(self, choice: Choice) -> bytes:
        """The event before the first piece of a choice."""

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """Events for a piece of one choice's output."""
        if not (
            self._usage_always or piece.tokens or piece.token_ids or piece.reasoning or piece.calls
        ):
            head, tail = self._frames.get(choice.index) or self._frame(choice.index)
            return head + orjson.dumps(piece.content) + tail
        bodies = self._bodies(piece)
        choices = [self._stream_choice(choice.index, body) for body in bodies]
        if piece.tokens:
            choices[0]["logprobs"] = self._logprobs(piece.tokens)
        if piece.token_ids:
            choices[0]["token_ids"] = piece.token_ids
        usage = usage_of(choice) if self._usage_always else None
        return b"".join(event(self._chunk([one], usage)) for one in choices)

    def closing(self, choice: Choice) -> bytes:
        """The event that says why a choice ended."""
        ended = self._stream_choice(choice.index, self._no_body())
        ended["finish_reason"] = choice.output.finish_reason
        # The two names under which other servers say it.
        ended["stop_reason"] = ended["matched_stop"] = choice.output.stop_reason
        usage = usage_of(choice) if self._usage_always else None
        return event(self._chunk([ended], usage))

    def ending(self, usage: Usage) -> bytes:
        """The usage of the whole request without choices, if it was asked for; then the end."""
        total = event(self._chunk([], usage)) if self._usage_at_end else b""
        return total + DONE

    def failure(self, error: ErrorAnswer) -> bytes:
        """The error as an event."""
        return event(error.body)

    def whole(self, choices: Sequence[EndedChoice], usage: Usage) -> bytes:
        """The answer to a request that does not stream."""
        shown = [self._ended(one.choice, one.piece) for one in choices]
        head = self._head(stream=False)
        more = self._prompt_fields(choices)
        return orjson.dumps({**head, "choices": shown, "usage": usage.json(), **more})

    def _ended(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        shown = {
            "index": choice.index,
            **self._whole_body(choice, piece),
            "logprobs": self._whole_logprobs(choice, piece),
            "finish_reason": choice.output.finish_reason,
            "stop_reason": choice.output.stop_reason,
            "matched_stop": choice.output.stop_reason,
        }
        if self._shows_ids:
            shown["prompt_token_ids"] = list(choice.prompt.token_ids)
            shown["token_ids"] = piece.token_ids
        return shown

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        (body,) = self._bodies(Piece(content=_MARK))
        whole = event(self._chunk([self._stream_choice(index, body)], None))
        head, _, tail = whole.partition(_MARK_JSON)
        return self._frames.setdefault(index, (head, tail))

    def _whole_logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        return self._logprobs(piece.tokens) if piece.tokens else None

    def _prompt_fields(self, choices: Sequence[EndedChoice]) -> dict[str, Any]:
        """What an answer that does not stream says of the prompt beside its choices."""
        return {}

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        """The field of that name, if it was asked for."""
        if self._num_prompt_logprobs is None or choice.scores is None:
            return {}
        entries = prompt_logprobs(
            choice.prompt.token_ids,
            choice.scores.logprobs,
            self._num_prompt_logprobs,
            self._token_bytes,
        )
        return {"prompt_logprobs": entries}

    def _opened(
        self, choice: Choice, body: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> bytes:
        opened = {**self._stream_choice(choice.index, body), "logprobs": logprobs}
        if self._shows_ids:
            opened["prompt_token_ids"] = list(choice.prompt.token_ids)
        return event(self._chunk([opened], None))

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        chunk = {**self._head(stream=True), "choices": choices}
        if self._usage_at_end or usage is not None:
            chunk["usage"] = usage.json() if usage is not None else None
        return chunk

    def _head(self, *, stream: bool) -> dict[str, Any]:
        return {
            "id": self._facts.answer_id,
            "object": self._object(stream),
            "created": self._facts.created,
            "model": self._facts.model,
        }

    def _stream_choice(self, index: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **body, "logprobs": None, "finish_reason": None}

    @abstractmethod
    def _object(self, stream: bool) -> str: ...

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]: ...

    @abstractmethod
    def _bodies(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece as the bodies of one chunk or several, at least one."""

    @abstractmethod
    def _no_body(self) -> dict[str, Any]: ...

    @abstractmethod
    def _whole_body(self, choice: Choice, piece: Piece) -> dict[str, Any]: ...
