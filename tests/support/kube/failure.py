"""What the server says when it refuses."""

from http import HTTPStatus

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    406: "NotAcceptable",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
}


class Failure(Exception):
    """Becomes a Status object and an HTTP status."""

    def __init__(self, code: int, message: str, *, reason: str = "", **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason or REASONS.get(code, HTTPStatus(code).phrase.replace(" ", ""))
        self.details = details

    def status(self) -> dict[str, object]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }
