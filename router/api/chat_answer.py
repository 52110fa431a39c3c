"""Answers in the shape of /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from router.api.choice import Choice, EndedChoice
from router.api.logprobs import chat_logprobs
from router.api.openai_answer import OpenAiAnswer
from router.api.output import Piece, TokenText
from router.text.message import CallDelta


class ChatAnswer(OpenAiAnswer):
    """An Answer whose choices are messages."""

    def opening(self, choice: Choice) -> bytes:
        """The event that gives the role, which comes before any content."""
        return self._opened(choice, _delta(role="assistant", content=choice.prompt.echo))

    def _prompt_fields(self, choices: Sequence[EndedChoice]) -> dict[str, Any]:
        return self._prompt_logprobs(choices[0].choice)

    def _object(self, stream: bool) -> str:
        return "chat.completion.chunk" if stream else "chat.completion"

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return chat_logprobs(tokens, self._token_bytes)

    def _bodies(self, piece: Piece) -> list[dict[str, Any]]:
        bodies = []
        if piece.reasoning:
            bodies.append(_delta(reasoning_content=piece.reasoning))
        if piece.content:
            bodies.append(_delta(content=piece.content))
        for call in piece.calls:
            if call.name is not None:
                bodies.append(_delta(tool_calls=[_begun(call)]))
            if call.arguments:
                function = {"arguments": call.arguments}
                bodies.append(_delta(tool_calls=[{"index": call.index, "function": function}]))
        return bodies or [_delta(content="")]

    def _no_body(self) -> dict[str, Any]:
        return _delta()

    def _whole_body(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        content = choice.prompt.echo + piece.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.calls:
            message["content"] = content or None
            message["tool_calls"] = [_whole_call(call) for call in piece.calls]
        return {"message": message}


def _delta(**fields: Any) -> dict[str, Any]:
    return {"delta": fields}


def _begun(call: CallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": ""}
    return {"index": call.index, "id": call.call_id, "type": "function", "function": function}


def _whole_call(call: CallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
