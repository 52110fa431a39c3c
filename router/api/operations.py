"""GET endpoints: what is served, how this router is, and what happened to a request."""

from collections.abc import Callable

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from core.errors import ErrorCode, UnavailableError
from router.api.errors import HttpError, ModelNotFoundError, error_answer
from router.api.exchange import Exchange
from router.api.parts import ApiParts


class Operations:
    """Endpoints without a body."""

    def __init__(
        self, parts: ApiParts, *, registry: CollectorRegistry, started_at: Callable[[], int]
    ) -> None:
        """Serve with `parts`.

        Args:
            parts: collaborators.
            registry: metrics of this process.
            started_at: returns seconds since the epoch, the `created` of the served model.
        """
        self._parts = parts
        self._registry = registry
        self._created = started_at()

    async def health(self, exchange: Exchange) -> None:
        """The process lives and its event loop turns."""
        await exchange.answer(b'{"status":"ok"}')

    async def ready(self, exchange: Exchange) -> None:
        """A request would be admitted now."""
        if not self._parts.generator.ready:
            # Answered, not raised: a probe that asks while workers start is no failure to log.
            answer = error_answer(UnavailableError(f"Not ready: {self._why_not()}"))
            await exchange.answer(answer.json(), status=answer.status, headers=answer.headers)
            return
        await exchange.answer(b'{"status":"ready"}')

    async def metrics(self, exchange: Exchange) -> None:
        """Prometheus text."""
        accept = exchange.headers.get(b"accept", b"").decode("latin-1")
        encode, content_type = choose_encoder(accept)
        await exchange.answer(encode(self._registry), content_type=content_type.encode())

    async def models(self, exchange: Exchange) -> None:
        """Every served model that the caller may use."""
        served = [self._model()] if exchange.caller.may_use(self._parts.served_name) else []
        await exchange.answer(orjson.dumps({"object": "list", "data": served}))

    async def model(self, exchange: Exchange) -> None:
        """One served model."""
        name = exchange.path_params["name"]
        if name != self._parts.served_name:
            raise ModelNotFoundError(name, self._parts.served_name)
        self._parts.model(name, exchange.caller)
        await exchange.answer(orjson.dumps(self._model()))

    async def timeline(self, exchange: Exchange) -> None:
        """Where the time of a request went, per sequence.

        The id is that of the answer, its x-request-id, or that of one sequence.
        """
        await self._answer_about(exchange, "request.timeline", self._parts.generator.timeline)

    async def explain(self, exchange: Exchange) -> None:
        """Why a request went where it went: every candidate with its cost, per sequence."""
        await self._answer_about(exchange, "request.explanation", self._parts.generator.explain)

    async def _answer_about(
        self,
        exchange: Exchange,
        kind: str,
        look_up: Callable[[str], dict[str, object] | None],
    ) -> None:
        name = exchange.path_params["id"]
        parts = [look_up(part) for part in self._parts.recent.parts(exchange.caller, name)]
        found = [part for part in parts if part is not None]
        if not found:
            raise HttpError(
                404,
                ErrorCode.NOT_FOUND,
                f"No request {name[:128]!r} is remembered here; only recent requests are.",
            )
        answer = {"id": name, "object": kind, "sequences": found}
        await exchange.answer(orjson.dumps(answer, default=str))

    def _model(self) -> dict[str, object]:
        model = self._parts.generator.model
        return {
            "id": self._parts.served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "diptych",
            "root": model.name,
            "max_model_len": model.max_model_len,
        }

    def _why_not(self) -> str:
        try:
            self._parts.generator.model  # noqa: B018 - asked for its error
        except UnavailableError as error:
            return error.message
        return "no worker can admit a request now."
