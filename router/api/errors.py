"""Every failure as an answer in OpenAI's error shape."""

import math
from dataclasses import dataclass
from typing import Any

import orjson

from core.errors import DiptychError, ErrorCode, InvalidRequestError, OverloadedError

Headers = list[tuple[bytes, bytes]]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ClientDisconnectedError(Exception):
    """The client went away; there is nobody to answer."""


class HttpError(Exception):
    """A refusal by the HTTP layer itself, before any request was understood."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Headers | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or []
        self.param = param


class ModelNotFoundError(HttpError):
    """The client named a model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(
            404,
            "model_not_found",
            f"The model {name[:128]!r} is not served here; served: {served!r}.",
            param="model",
        )


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as it goes over HTTP."""

    status: int
    body: dict[str, Any]
    headers: Headers

    @property
    def code(self) -> str:
        """The cause, as metrics name it."""
        return str(self.body["error"]["code"])

    def json(self) -> bytes:
        """The body."""
        return orjson.dumps(self.body)


def error_answer(error: BaseException) -> ErrorAnswer:
    """Shape any failure; one that we did not foresee becomes a 500 without our insides."""
    if isinstance(error, HttpError):
        return _shaped(error.status, error.code, str(error), error.param, error.headers)
    if not isinstance(error, DiptychError):
        return _shaped(
            500, ErrorCode.INTERNAL, "The router failed on this request; its log says why."
        )
    param = error.param if isinstance(error, InvalidRequestError) else None
    headers: Headers = []
    if isinstance(error, OverloadedError):
        seconds = max(1, math.ceil(error.retry_after_s))
        headers.append((b"retry-after", b"%d" % seconds))
    return _shaped(error.http_status, error.code, error.message, param, headers)


def _shaped(
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Headers | None = None,
) -> ErrorAnswer:
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": str(code)}
    return ErrorAnswer(status, {"error": error}, headers or [])
