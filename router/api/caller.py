"""Who a request is from and how urgent it is: what the queue's order depends on."""

from collections.abc import Mapping
from hashlib import sha256

from core.errors import InvalidRequestError
from router.admission import Priority

PRIORITY_HEADER = b"x-request-priority"


def caller_key(headers: Mapping[bytes, bytes], user: str | None) -> str:
    """Whose turn the request takes.

    That of its API key if it has one, so that nobody gets more turns by naming more users; else
    that of the user whom the body names. A secret is never kept, only its digest.
    """
    secret = headers.get(b"authorization") or headers.get(b"x-api-key")
    if secret:
        return f"key {sha256(secret).hexdigest()[:16]}"
    return f"user {user}" if user else ""


def priority_of(headers: Mapping[bytes, bytes]) -> Priority:
    """The class that the request asks for.

    Raises:
        InvalidRequestError: there is no such class.
    """
    header = headers.get(PRIORITY_HEADER)
    if header is None:
        return Priority.NORMAL
    name = header.decode("latin-1").strip().upper()
    if name not in Priority.__members__:
        allowed = ", ".join(each.name.lower() for each in Priority)
        raise InvalidRequestError(
            f"The header x-request-priority must be one of {allowed}, got {name[:32].lower()!r}.",
            param="x-request-priority",
        )
    return Priority[name]
