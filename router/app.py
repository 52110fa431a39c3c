"""The router's HTTP application: routes, request ids, and errors as answers.

router/main.py makes it and runs it under an ASGI server. Invariant: every answer carries
x-request-id, every error has OpenAI's shape, and no input makes a 500.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from core.errors import ErrorCode
from router.access.caller import Access
from router.access.door import Door
from router.api.chat import ChatDialect
from router.api.completions import CompletionDialect
from router.api.errors import ClientDisconnectedError, ErrorAnswer, HttpError, error_answer
from router.api.exchange import Endpoint, Exchange
from router.api.generate import TextEndpoint
from router.api.identity import identify
from router.api.metrics import ApiMetrics
from router.api.native.dialect import NativeDialect
from router.api.native.endpoints import AbortBody, NativeEndpoints
from router.api.native.request import NativeBody
from router.api.observation import Observation, Observed
from router.api.openapi import ApiRoute, OpenApi
from router.api.operations import Operations
from router.api.parts import ApiParts, Gate, RecentRequests
from router.api.reading import BodyReader
from router.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from router.api.responses.endpoints import ResponseEndpoints, ResponsesDialect
from router.api.responses.request import ResponsesBody
from router.api.responses.store import ResponseStore
from router.api.settings import ApiSettings
from router.api.token_endpoints import TokenEndpoints
from router.console.page import ConsolePage
from router.generation import FleetControl, Generator
from router.http_protocol import send_now
from router.text.processor import TextProcessor

_log = logging.getLogger(__name__)


def create_app(
    *,
    generator: Generator,
    fleet: FleetControl,
    facts: Mapping[str, object],
    text: TextProcessor,
    settings: ApiSettings,
    observed: Observed,
    registry: CollectorRegistry,
    door: Door | None = None,
) -> "HttpApp":
    """Put the HTTP side together.

    Args:
        generator: runs sequences on the fleet.
        fleet: the workers as a whole.
        facts: settings and version of this router, for /get_server_info; free of secrets.
        text: tokenizer and chat template of the served model.
        settings: what the operator decided.
        observed: what /v1/fleet and /v1/requests show.
        registry: gets the metrics of the API; GET /metrics shows all of it.
        door: says who may come in, and has the clock that deadlines are on; default: everyone.

    Returns:
        An ASGI application.
    """
    door = door or Door(None)
    parts = ApiParts(
        generator=generator,
        text=text,
        settings=settings,
        metrics=ApiMetrics(registry, settings.slo),
        recent=RecentRequests(settings.recent_requests),
        gate=Gate(settings.max_in_flight),
        bodies=BodyReader(),
        salt=door.salt,
        clock=door.clock,
    )
    operations = Operations(parts, registry=registry, started_at=lambda: int(time.time()))
    observation = Observation(observed)
    tokens = TokenEndpoints(parts)
    stored = ResponseStore(
        capacity=settings.stored_responses, capacity_bytes=settings.stored_responses_bytes
    )
    responses = ResponseEndpoints(parts, stored)
    native = NativeEndpoints(parts, fleet, facts=facts)
    routes = [
        _post(
            "/v1/chat/completions",
            TextEndpoint(parts, ChatDialect()),
            "Answers a conversation.",
            ChatRequest,
            produces=_STREAMED,
            metered=True,
        ),
        _post(
            "/v1/completions",
            TextEndpoint(parts, CompletionDialect()),
            "Goes on with text.",
            CompletionRequest,
            produces=_STREAMED,
            metered=True,
        ),
        _post(
            "/v1/responses",
            TextEndpoint(parts, ResponsesDialect(stored)),
            "Answers a conversation in items.",
            ResponsesBody,
            produces=_STREAMED,
            metered=True,
        ),
        _get("/v1/responses/{id}", responses.get, "A stored response."),
        _route("DELETE", "/v1/responses/{id}", responses.delete, "Forgets a stored response."),
        _post("/v1/responses/{id}/cancel", responses.cancel, "Ends a response that is under way."),
        _post(
            "/generate",
            TextEndpoint(parts, NativeDialect()),
            "Goes on with text or token ids.",
            NativeBody,
            produces=_STREAMED,
            metered=True,
        ),
        _post("/abort_request", native.abort, "Ends requests with what they have.", AbortBody),
        _post(
            "/flush_cache",
            native.flush_cache,
            "Empties every worker's prefix cache.",
            access=_ADMIN,
        ),
        _get("/get_model_info", native.model_info, "The served model."),
        _get("/get_server_info", native.server_info, "This router and its workers.", access=_ADMIN),
        *(
            _post(path, tokens.tokenize, "Token ids of text or a chat.", *_TOKENIZE, metered=True)
            for path in ("/tokenize", "/v1/tokenize")
        ),
        *(
            _post(path, tokens.detokenize, "Text of token ids.", DetokenizeRequest, metered=True)
            for path in ("/detokenize", "/v1/detokenize")
        ),
        _get("/v1/models", operations.models, "Every served model."),
        _get("/v1/models/{name:path}", operations.model, "One served model."),
        _get("/v1/requests", observation.requests, "The latest requests.", access=_ADMIN),
        _get("/v1/fleet", observation.fleet, "Workers, their work, their links.", access=_ADMIN),
        _get("/v1/requests/{id:path}/timeline", operations.timeline, "Where the time went."),
        _get("/v1/requests/{id:path}/explain", operations.explain, "Why it went where it went."),
        _get("/health", operations.health, "The process lives.", access=_OPEN),
        _get("/ready", operations.ready, "A request would be admitted.", access=_OPEN),
        _get(
            "/metrics",
            operations.metrics,
            "Prometheus metrics.",
            produces=_METRICS,
            access=_ADMIN,
        ),
    ]
    version = str(facts.get("version", "unknown"))
    document = OpenApi(tuple(routes), version=version)
    routes.append(_get("/openapi.json", document, "This document."))
    if settings.console:
        page = ConsolePage()
        routes += [
            _get("/console", page.index, "A page to look at.", access=Access.PAGE),
            _get("/console/{file}", page.part, "Parts of that page.", access=Access.PAGE),
        ]
    return HttpApp(routes, door, parts.metrics)


class HttpApp:
    """Dispatches requests to endpoints and answers for those that fail."""

    def __init__(self, routes: Sequence[Route], door: Door, metrics: ApiMetrics) -> None:
        self._router = Router(routes=routes, redirect_slashes=False)
        self.door = door
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = Exchange(
            identity=identify(headers),
            received_at=self.door.clock(),
            headers=headers,
            path_params={},
            receive=receive,
            send=send,
            send_now=send_now(scope.get("extensions")),
        )
        scope["app"] = self  # makes starlette raise for 404 and 405 instead of answering in text
        scope["exchange"] = exchange
        try:
            await self._router(scope, receive, send)
        except ClientDisconnectedError:
            _log.info("client left", extra=exchange.log_fields)
        except Exception as error:
            answer = await _answer_error(_translated(error, scope), exchange)
            if answer.status in _REFUSED:
                self._metrics.refusals.labels(answer.code).inc()
        finally:
            # They know the scope in turn, and only the garbage collector would free them.
            for name in ("exchange", "extensions"):
                scope.pop(name, None)


class _EndpointApp:
    """An endpoint as starlette wants it, behind the door."""

    def __init__(self, endpoint: Endpoint, access: Access, *, metered: bool) -> None:
        self._endpoint = endpoint
        self._access = access
        self._metered = metered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        app: HttpApp = scope["app"]
        exchange.caller = app.door.admit(exchange.headers, self._access)
        exchange.path_params = scope["path_params"]
        exchange.query = scope["query_string"]
        if self._metered:
            exchange.allowance = app.door.allowance(exchange.caller)
        with exchange.allowance.request() if exchange.allowance is not None else nullcontext():
            await self._endpoint(exchange)


def _route(
    method: str,
    path: str,
    endpoint: Endpoint,
    summary: str,
    *bodies: type[BaseModel],
    produces: Sequence[str] = ("application/json",),
    access: Access = Access.KEY,
    metered: bool = False,
) -> ApiRoute:
    """`metered`: requests count against the limits of their key."""
    app = _EndpointApp(endpoint, access, metered=metered)
    route = ApiRoute(path, app, methods=[method])
    route.summary, route.bodies, route.produces = summary, bodies, produces
    return route


_get = partial(_route, "GET")
_post = partial(_route, "POST")
_ADMIN, _OPEN = Access.ADMIN, Access.OPEN
_REFUSED = (401, 403, 429)
_STREAMED = ("application/json", "text/event-stream")
_METRICS = ("text/plain", "application/openmetrics-text")
_TOKENIZE = (TokenizeTextRequest, TokenizeChatRequest)


async def _answer_error(error: Exception, exchange: Exchange) -> ErrorAnswer:
    answer = error_answer(error)
    if answer.status >= 500:
        unforeseen = answer.code == ErrorCode.INTERNAL
        _log.log(
            logging.ERROR if unforeseen else logging.WARNING,
            "request failed: %s",
            error,
            exc_info=error if unforeseen else None,
            extra={**exchange.log_fields, "code": answer.code},
        )
    if not exchange.started:
        await exchange.answer(answer.json(), status=answer.status, headers=answer.headers)
    return answer


def _translated(error: Exception, scope: Scope) -> Exception:
    if not isinstance(error, HTTPException):
        return error
    target = f"{scope['method']} {scope['path'][:256]}"
    headers = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        return HttpError(
            405,
            "method_not_allowed",
            f"{target} is not served; this path takes {allowed}.",
            headers=headers,
        )
    return HttpError(error.status_code, ErrorCode.NOT_FOUND, f"{target} is not served here.")
