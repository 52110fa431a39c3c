"""POST /v1/responses as a dialect, and what can be done with a response by its id."""

from collections.abc import Mapping
from typing import Any

import orjson

from core.errors import ErrorCode
from router.access.caller import Caller
from router.api.answer import Answer, AnswerFacts
from router.api.chat import ChatDialect
from router.api.errors import HttpError
from router.api.exchange import Exchange
from router.api.parts import ApiParts
from router.api.requests import TextRequest
from router.api.responses.answer import ResponsesAnswer
from router.api.responses.request import ResponsesRequest, as_chat, read_body
from router.api.responses.store import ResponseStore


class ResponsesDialect(ChatDialect):
    """Items in, items out; between them a chat."""

    name = "responses"
    id_prefix = "resp_"
    prompt_field = "input"

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def read(self, data: Mapping[str, Any], caller: Caller) -> TextRequest:
        """Check the fields of a body and find the response that it goes on from."""
        body = read_body(data)
        if body.previous_response_id is None:
            return as_chat(body, ())
        previous = self._store.get(body.previous_response_id, caller, param="previous_response_id")
        return as_chat(body, previous.messages)

    def answer(self, request: TextRequest, facts: AnswerFacts) -> Answer:
        """An answer in the endpoint's own shape."""
        assert isinstance(request, ResponsesRequest)
        return ResponsesAnswer(facts, request, self._store)


class ResponseEndpoints:
    """GET, DELETE and cancel."""

    def __init__(self, parts: ApiParts, store: ResponseStore) -> None:
        self._parts = parts
        self._store = store

    async def get(self, exchange: Exchange) -> None:
        """A response that has ended."""
        stored = self._store.get(exchange.path_params["id"], exchange.caller)
        await exchange.answer(stored.body)

    async def delete(self, exchange: Exchange) -> None:
        """Forget a response."""
        response_id = exchange.path_params["id"]
        self._store.delete(response_id, exchange.caller)
        deleted = {"id": response_id, "object": "response.deleted", "deleted": True}
        await exchange.answer(orjson.dumps(deleted))

    async def cancel(self, exchange: Exchange) -> None:
        """End a response that is still being generated; its own answer ends with what it has."""
        response_id = exchange.path_params["id"]
        names = self._parts.recent.parts(exchange.caller, response_id)
        if sum(map(self._parts.generator.abort, names)):
            body = {"id": response_id, "object": "response", "status": "cancelled"}
            await exchange.answer(orjson.dumps(body))
            return
        self._store.get(response_id, exchange.caller)
        raise HttpError(
            409, ErrorCode.INVALID_REQUEST, f"Response {response_id[:128]!r} has ended already."
        )
