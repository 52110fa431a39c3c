"""The JSON of answers: whole ones and the chunks of a stream, for chats and for completions.

A stream's chunk is a constant head, the text, and a constant tail; only the text is encoded per
turn. Both kinds of answer share everything but a few names, which is what the subclasses give.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from router.api.logprobs import TokenBytes, chat_logprobs, completion_logprobs
from router.api.output import Output, Piece, TokenText

DONE = b"data: [DONE]\n\n"
_MARK = "\x00"
_MARK_JSON = orjson.dumps(_MARK)


@dataclass(slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache; None while not known."""

    def json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        known = self.cached_tokens is not None
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens} if known else None,
        }


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % orjson.dumps(data)


class Answer(ABC):
    """Builds the answer to one request, in the shape of a chat or a completion."""

    def __init__(
        self,
        *,
        answer_id: str,
        created: int,
        model: str,
        token_bytes: TokenBytes,
        usage_field: bool = False,
    ) -> None:
        """Fix what all chunks share.

        Args:
            answer_id: `id` of the answer.
            created: seconds since the epoch.
            model: name that clients use.
            token_bytes: bytes of a token id.
            usage_field: every chunk has the field `usage`, null except in the last.
        """
        self._id, self._created, self._model = answer_id, created, model
        self._token_bytes = token_bytes
        self._usage_field = usage_field
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, index: int, piece: Piece, usage: Usage | None = None) -> bytes:
        """The event for a piece of one choice's output."""
        if piece.tokens or piece.token_ids or usage is not None:
            choice = self._stream_choice(index, piece.text, self._logprobs(piece.tokens))
            if piece.token_ids:
                choice["token_ids"] = piece.token_ids
            return event(self._chunk([choice], usage))
        frame = self._frames.get(index)
        if frame is None:
            whole = event(self._chunk([self._stream_choice(index, _MARK, None)], None))
            head, _, tail = whole.partition(_MARK_JSON)
            frame = self._frames[index] = head, tail
        return b"%b%b%b" % (frame[0], orjson.dumps(piece.text), frame[1])

    @abstractmethod
    def opening(self, index: int, prompt: str, prompt_ids: Sequence[int] | None) -> bytes:
        """The event before the first piece of a choice; empty where there is nothing to say."""

    def closing(self, index: int, output: Output, usage: Usage | None = None) -> bytes:
        """The event that says why a choice ended."""
        choice = self._stream_choice(index, "", None, last=True)
        choice["finish_reason"] = output.finish_reason
        choice["stop_reason"] = output.stop_reason
        return event(self._chunk([choice], usage))

    def usage_event(self, usage: Usage) -> bytes:
        """The event with the usage of the whole request, and no choices."""
        return event(self._chunk([], usage))

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes:
        """The answer to a request that does not stream."""
        return orjson.dumps({**self._head(stream=False), "choices": choices, "usage": usage.json()})

    def choice(
        self,
        index: int,
        output: Output,
        piece: Piece,
        *,
        prompt: str,
        prompt_ids: Sequence[int] | None,
    ) -> dict[str, Any]:
        """One choice of a whole answer."""
        choice = {
            "index": index,
            **self._whole_choice(prompt + piece.text, self._logprobs(piece.tokens)),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if prompt_ids is not None:
            choice["prompt_token_ids"] = list(prompt_ids)
            choice["token_ids"] = piece.token_ids
        return choice

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        chunk = {**self._head(stream=True), "choices": choices}
        if self._usage_field or usage is not None:
            chunk["usage"] = usage.json() if usage is not None else None
        return chunk

    def _head(self, *, stream: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._object(stream),
            "created": self._created,
            "model": self._model,
        }

    @abstractmethod
    def _object(self, stream: bool) -> str: ...

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None: ...

    @abstractmethod
    def _stream_choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, *, last: bool = False
    ) -> dict[str, Any]: ...

    @abstractmethod
    def _whole_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    """In the shape of /v1/chat/completions."""

    def opening(self, index: int, prompt: str, prompt_ids: Sequence[int] | None) -> bytes:
        """The event that gives the role, which comes before any content."""
        choice = self._stream_choice(index, "", None)
        choice["delta"] = {"role": "assistant", "content": prompt}
        if prompt_ids is not None:
            choice["prompt_token_ids"] = list(prompt_ids)
        return event(self._chunk([choice], None))

    def _object(self, stream: bool) -> str:
        return "chat.completion.chunk" if stream else "chat.completion"

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._token_bytes) if tokens else None

    def _stream_choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, *, last: bool = False
    ) -> dict[str, Any]:
        delta = {} if last else {"content": text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _whole_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": logprobs}


class CompletionAnswer(Answer):
    """In the shape of /v1/completions."""

    def opening(self, index: int, prompt: str, prompt_ids: Sequence[int] | None) -> bytes:
        """The event with the echoed prompt, where there is one."""
        if not prompt and prompt_ids is None:
            return b""
        choice = self._stream_choice(index, prompt, None)
        if prompt_ids is not None:
            choice["prompt_token_ids"] = list(prompt_ids)
        return event(self._chunk([choice], None))

    def _object(self, stream: bool) -> str:
        return "text_completion"

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        return completion_logprobs(tokens, self._token_bytes) if tokens else None

    def _stream_choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, *, last: bool = False
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _whole_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}
