"""Who a request is from and how urgent it is: what the queue's order depends on."""

from collections.abc import Mapping
from hashlib import sha256

from core.errors import InvalidRequestError
from router.access.caller import Caller
from router.access.door import forbidden
from router.admission import Priority

PRIORITY_HEADER = b"x-request-priority"


def caller_key(caller: Caller, headers: Mapping[bytes, bytes], user: str | None) -> str:
    """Whose turn the request takes.

    That of its tenant. Where no keys are needed: that of the API key that it bears all the same, so
    that nobody gets more turns by naming more users, else that of the user whom the body names. A
    secret is never kept, only its digest.
    """
    if caller.tenant:
        return f"tenant {caller.tenant}"
    secret = headers.get(b"authorization") or headers.get(b"x-api-key")
    if secret:
        return f"key {sha256(secret).hexdigest()[:16]}"
    return f"user {user}" if user else ""


def priority_of(caller: Caller, headers: Mapping[bytes, bytes]) -> Priority:
    """The class that the request asks for, or that its key stands for.

    Raises:
        InvalidRequestError: there is no such class.
        HttpError: 403; it is too urgent a class for this key.
    """
    header = headers.get(PRIORITY_HEADER)
    if header is None:
        return caller.priority
    name = header.decode("latin-1").strip().upper()
    if name not in Priority.__members__:
        allowed = ", ".join(each.name.lower() for each in Priority)
        raise InvalidRequestError(
            f"The header x-request-priority must be one of {allowed}, got {name[:32].lower()!r}.",
            param="x-request-priority",
        )
    priority = Priority[name]
    if priority < caller.best_priority:
        asked = f"request asks for priority {priority.name.lower()}"
        raise forbidden(caller, asked, param="x-request-priority")
    return priority
