"""Which request this is: the ids that clients and tracers send along, as far as they are fit."""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

MAX_REQUEST_ID_CHARS = 128
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """What log lines, timelines and answers name a request by."""

    request_id: str
    """x-request-id of the request and its answer."""
    client_gave_id: bool
    trace_id: str | None
    """Of the trace that the client's call belongs to."""


def identify(headers: Mapping[bytes, bytes]) -> RequestIdentity:
    """Read x-request-id and traceparent; what is missing or unfit is made up, or left out."""
    given = _valid_request_id(headers.get(b"x-request-id", b""))
    return RequestIdentity(
        given or uuid.uuid4().hex, given is not None, _trace_id(headers.get(b"traceparent", b""))
    )


def _valid_request_id(header: bytes) -> str | None:
    """The client's id if it is safe to log and to send back."""
    if not 0 < len(header) <= MAX_REQUEST_ID_CHARS:
        return None
    return header.decode() if all(0x20 < byte < 0x7F for byte in header) else None


def _trace_id(header: bytes) -> str | None:
    """Trace id of a traceparent header.

    Source: W3C Trace Context; a version above ours is read as far as ours goes.
    """
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None or not match[1].strip(b"0") or not match[2].strip(b"0"):
        return None
    return match[1].decode()
