"""The JSON of a response, whole or as a stream of typed events."""

from collections.abc import Sequence
from typing import Any

import orjson

from core.sampling import StructuredOutput
from router.api.answer import AnswerFacts, Usage
from router.api.choice import Choice, EndedChoice
from router.api.errors import ErrorAnswer
from router.api.output import Piece
from router.api.responses.events import ItemStream
from router.api.responses.items import messages_of
from router.api.responses.request import ResponsesRequest
from router.api.responses.store import ResponseStore, StoredResponse
from router.api.tools import Tool, ToolChoice

_BYTES_PER_MESSAGE = 256
"""What a message that is kept counts for, its text apart."""


class ResponsesAnswer:
    """An Answer of one choice."""

    def __init__(self, facts: AnswerFacts, request: ResponsesRequest, store: ResponseStore) -> None:
        self._facts = facts
        self._request = request
        self._store = store
        self._items = ItemStream(facts.answer_id.rpartition("_")[2])
        self._finish_reason: str | None = None

    def opening(self, choice: Choice) -> bytes:
        """The response exists, and work has begun."""
        begun = self._response("in_progress")
        return self._items.event("response.created", response=begun) + self._items.event(
            "response.in_progress", response=begun
        )

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """Events of a piece."""
        return self._items.take(piece)

    def closing(self, choice: Choice) -> bytes:
        """Events that end the last item."""
        self._finish_reason = choice.output.finish_reason
        return self._items.close(_item_status(self._finish_reason))

    def ending(self, usage: Usage) -> bytes:
        """The event with the whole response."""
        response = self._ended(usage)
        kind = "completed" if response["status"] == "completed" else "incomplete"
        return self._items.event(f"response.{kind}", response=response)

    def failure(self, error: ErrorAnswer) -> bytes:
        """An error event, and the response that failed."""
        cause = error.body["error"]
        shown = {"code": cause["code"], "message": cause["message"]}
        response = {**self._response("failed"), "error": shown}
        return self._items.event("error", **shown, param=cause["param"]) + self._items.event(
            "response.failed", response=response
        )

    def whole(self, choices: Sequence[EndedChoice], usage: Usage) -> bytes:
        """The response at once."""
        (ended,) = choices
        self._items.take(ended.piece)
        self.closing(ended.choice)
        return orjson.dumps(self._ended(usage))

    def _ended(self, usage: Usage) -> dict[str, Any]:
        response = self._response(_status(self._finish_reason))
        if response["status"] == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = _usage(usage)
        if self._request.body.store:
            self._keep(orjson.dumps(response))
        return response

    def _keep(self, body: bytes) -> None:
        instructed = bool(self._request.body.instructions)
        messages = [*self._request.messages[instructed:], *messages_of(self._items.items)]
        size = len(body) + sum(
            _BYTES_PER_MESSAGE + len(message.model_dump_json()) for message in messages
        )
        self._store.keep(
            self._facts.answer_id,
            StoredResponse(tenant=self._facts.tenant, body=body, messages=messages, size=size),
        )

    def _response(self, status: str) -> dict[str, Any]:
        body = self._request.body
        return {
            "id": self._facts.answer_id,
            "object": "response",
            "created_at": self._facts.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self._facts.model,
            "output": list(self._items.items),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": _format(body.text)},
            "tool_choice": _choice(body.tool_choice),
            "tools": [_tool(tool) for tool in body.tools],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _status(finish_reason: str | None) -> str:
    return {"length": "incomplete", "abort": "cancelled"}.get(finish_reason or "", "completed")


def _item_status(finish_reason: str | None) -> str:
    return "completed" if _status(finish_reason) == "completed" else "incomplete"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _choice(choice: ToolChoice) -> str | dict[str, str]:
    if choice.mode == "named":
        return {"type": "function", "name": choice.name}
    return choice.mode


def _format(text: StructuredOutput | None) -> dict[str, Any]:
    if text is None or text.kind == "json_object":
        return {"type": "text" if text is None else "json_object"}
    schema = orjson.loads(text.definition)
    return {"type": "json_schema", "name": "response", "schema": schema, "strict": True}


def _tool(tool: Tool) -> dict[str, Any]:
    return {"type": "function", **tool.function.model_dump()}
