"""The router's HTTP application: routes, request ids, and errors as answers.

router/main.py makes it and runs it under an ASGI server. Invariant: every answer carries
x-request-id, every error has OpenAI's shape, and no input makes a 500.
"""

import logging
import time
import uuid
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from core.clock import Clock, monotonic
from core.errors import ErrorCode
from router.api.chat import ChatDialect
from router.api.completions import CompletionDialect
from router.api.errors import ClientDisconnectedError, HttpError, error_answer
from router.api.exchange import Endpoint, Exchange
from router.api.generate import TextEndpoint
from router.api.metrics import ApiMetrics
from router.api.operations import Operations
from router.api.parts import ApiParts, Gate, RecentRequests
from router.api.settings import ApiSettings
from router.api.token_endpoints import TokenEndpoints
from router.generation import Generator
from router.text.processor import TextProcessor

MAX_REQUEST_ID_CHARS = 128

_log = logging.getLogger(__name__)


def create_app(
    *,
    generator: Generator,
    text: TextProcessor,
    settings: ApiSettings,
    registry: CollectorRegistry,
    clock: Clock = monotonic,
) -> "HttpApp":
    """Put the HTTP side together.

    Args:
        generator: runs sequences on the fleet.
        text: tokenizer and chat template of the served model.
        settings: what the operator decided.
        registry: gets the metrics of the API; GET /metrics shows all of it.
        clock: the router's monotonic clock, the one that deadlines are on.

    Returns:
        An ASGI application.
    """
    parts = ApiParts(
        generator=generator,
        text=text,
        settings=settings,
        metrics=ApiMetrics(registry),
        recent=RecentRequests(settings.recent_requests),
        gate=Gate(settings.max_in_flight),
        clock=clock,
    )
    operations = Operations(parts, registry=registry, started_at=lambda: int(time.time()))
    tokens = TokenEndpoints(parts)
    routes = [
        _post("/v1/chat/completions", TextEndpoint(parts, ChatDialect())),
        _post("/v1/completions", TextEndpoint(parts, CompletionDialect())),
        _post("/tokenize", tokens.tokenize),
        _post("/v1/tokenize", tokens.tokenize),
        _post("/detokenize", tokens.detokenize),
        _post("/v1/detokenize", tokens.detokenize),
        _get("/v1/models", operations.models),
        _get("/v1/models/{name:path}", operations.model),
        _get("/v1/requests/{id:path}/timeline", operations.timeline),
        _get("/v1/requests/{id:path}/explain", operations.explain),
        _get("/health", operations.health),
        _get("/ready", operations.ready),
        _get("/metrics", operations.metrics),
    ]
    return HttpApp(routes, clock)


class HttpApp:
    """Dispatches requests to endpoints and answers for those that fail."""

    def __init__(self, routes: list[Route], clock: Clock) -> None:
        self._router = Router(routes=routes, redirect_slashes=False)
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = _valid_request_id(headers.get(b"x-request-id", b""))
        exchange = Exchange(
            request_id=given or uuid.uuid4().hex,
            client_gave_id=given is not None,
            received_at=self._clock(),
            headers=headers,
            path_params={},
            receive=receive,
            send=send,
        )
        scope["app"] = self  # makes starlette raise for 404 and 405 instead of answering in text
        scope["exchange"] = exchange
        try:
            await self._router(scope, receive, send)
        except ClientDisconnectedError:
            _log.info("client left", extra={"request_id": exchange.request_id})
        except Exception as error:
            await _answer_error(_translated(error, scope), exchange)


class _EndpointApp:
    """An endpoint as starlette wants it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.path_params = scope["path_params"]
        await self._endpoint(exchange)


def _post(path: str, endpoint: Endpoint) -> Route:
    return Route(path, _EndpointApp(endpoint), methods=["POST"])


def _get(path: str, endpoint: Endpoint) -> Route:
    return Route(path, _EndpointApp(endpoint), methods=["GET"])


async def _answer_error(error: Exception, exchange: Exchange) -> None:
    answer = error_answer(error)
    if answer.status >= 500:
        unforeseen = answer.code == ErrorCode.INTERNAL
        _log.log(
            logging.ERROR if unforeseen else logging.WARNING,
            "request failed: %s",
            error,
            exc_info=error if unforeseen else None,
            extra={"request_id": exchange.request_id, "code": answer.code},
        )
    if not exchange.started:
        await exchange.answer(answer.json(), status=answer.status, headers=answer.headers)


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


def _valid_request_id(header: bytes) -> str | None:
    """The client's id if it is safe to log and to send back."""
    if not 0 < len(header) <= MAX_REQUEST_ID_CHARS:
        return None
    return header.decode() if all(0x20 < byte < 0x7F for byte in header) else None
