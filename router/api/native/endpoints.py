"""Verbs of the native API that do not generate: abort, flush, and what runs here."""

from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import PlainValidator, WithJsonSchema

from core.errors import InvalidRequestError
from router.access.door import forbidden
from router.api.exchange import Exchange
from router.api.fields import Strict
from router.api.native.request import NAMES_SCHEMA, parse_names
from router.api.parsing import known_fields, validate
from router.api.parts import ApiParts
from router.generation import FleetControl


class AbortBody(Strict):
    """Body of POST /abort_request."""

    rid: Annotated[tuple[str, ...], PlainValidator(parse_names), WithJsonSchema(NAMES_SCHEMA)] = ()
    abort_all: bool = False


def _read_abort(data: Mapping[str, Any]) -> AbortBody:
    return validate(AbortBody, known_fields(data, AbortBody, {"abort_message": ()}))


class NativeEndpoints:
    """What whoever runs the fleet asks of it."""

    def __init__(
        self, parts: ApiParts, fleet: FleetControl, *, facts: Mapping[str, object]
    ) -> None:
        """Serve.

        Args:
            parts: collaborators of the API.
            fleet: the workers.
            facts: settings and version of this router, free of secrets.
        """
        self._parts = parts
        self._fleet = fleet
        self._facts = facts

    async def abort(self, exchange: Exchange) -> None:
        """End requests; each answers with what it has, finish reason `abort`."""
        body = await self._parts.bodies.read(await self._body(exchange), _read_abort)
        generator = self._parts.generator
        if body.abort_all and not exchange.caller.admin:
            raise forbidden(exchange.caller, "ends requests of others too", param="abort_all")
        if body.abort_all:
            aborted = generator.abort_all()
        elif body.rid:
            names = {
                part for rid in body.rid for part in self._parts.recent.parts(exchange.caller, rid)
            }
            aborted = sum([generator.abort(name) for name in names])
        else:
            raise InvalidRequestError("Send rid, or abort_all: true.", param="rid")
        await exchange.answer(orjson.dumps({"success": True, "aborted": aborted}))

    async def flush_cache(self, exchange: Exchange) -> None:
        """Have every worker forget the cached blocks that nothing holds."""
        flushed = await self._fleet.flush_caches()
        success = all("error" not in worker for worker in flushed)
        body = {"success": success, "workers": flushed}
        await exchange.answer(orjson.dumps(body), status=200 if success else 502)

    async def model_info(self, exchange: Exchange) -> None:
        """What is served."""
        model = self._parts.generator.model
        text = self._parts.text
        body = {
            "model_path": self._facts.get("model"),
            "served_model_name": self._parts.served_name,
            "is_generation": True,
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
            "eos_token_ids": model.eos_token_ids,
            "tool_parser": text.tool_format.name if text.tool_format else None,
            "reasoning": text.reasons,
        }
        await exchange.answer(orjson.dumps(body))

    async def server_info(self, exchange: Exchange) -> None:
        """Settings of this router and every worker that it knows."""
        body = {"router": self._facts, "workers": self._fleet.describe()}
        await exchange.answer(orjson.dumps(body, default=str))

    async def _body(self, exchange: Exchange) -> bytes:
        settings = self._parts.settings
        return await exchange.read_json_body(
            limit_bytes=settings.body_limit_bytes, timeout_s=settings.body_timeout_s
        )
