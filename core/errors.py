"""Every failure that can reach a user, with one code and one HTTP status each.

A message says what happened, the values involved, and what to do. Code that handles an error logs
it once; code that only passes it on does not.
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names of failure causes; they travel on the wire and label metrics."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH = "context_length_exceeded"
    NOT_FOUND = "not_found"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline_exceeded"
    WORKER_LOST = "worker_lost"
    KV_TRANSFER = "kv_transfer_failed"
    CONFIG = "invalid_config"
    UNAUTHENTICATED = "unauthenticated"
    INTERNAL = "internal"


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.CONTEXT_LENGTH: 400,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.DEADLINE: 504,
    ErrorCode.WORKER_LOST: 502,
    ErrorCode.KV_TRANSFER: 502,
    ErrorCode.CONFIG: 500,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.INTERNAL: 500,
}

RETRYABLE: frozenset[ErrorCode] = frozenset(
    {ErrorCode.WORKER_LOST, ErrorCode.KV_TRANSFER, ErrorCode.OVERLOADED, ErrorCode.UNAVAILABLE}
    | {ErrorCode.INTERNAL}
)
"""Causes that another attempt on another worker can cure."""


class DiptychError(Exception):
    """A failure with a code. Subclasses fix it; raise the base only for one read off a wire."""

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(self, message: str, *, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    @property
    def message(self) -> str:
        """The sentence for the user."""
        return str(self)

    @property
    def http_status(self) -> int:
        """Status of the HTTP answer that carries this error."""
        return HTTP_STATUS[self.code]

    @property
    def retryable(self) -> bool:
        """True if the router may place the request again."""
        return self.code in RETRYABLE


class InvalidRequestError(DiptychError):
    """The client sent something that can't be served as it is. `param` names the field."""

    code = ErrorCode.INVALID_REQUEST

    def __init__(
        self, message: str, *, param: str | None = None, code: ErrorCode | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.param = param


class OverloadedError(DiptychError):
    """A bounded queue is full. `retry_after_s` is the predicted wait in seconds."""

    code = ErrorCode.OVERLOADED

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(DiptychError):
    """No worker can serve the request now."""

    code = ErrorCode.UNAVAILABLE


class DeadlineError(DiptychError):
    """The request's deadline passed."""

    code = ErrorCode.DEADLINE


class WorkerLostError(DiptychError):
    """The worker that held the request went away."""

    code = ErrorCode.WORKER_LOST


class TransferError(DiptychError):
    """KV blocks could not be moved, or not be trusted."""

    code = ErrorCode.KV_TRANSFER


class ConfigError(DiptychError):
    """A setting is wrong; the message names it and a value that works."""

    code = ErrorCode.CONFIG
