"""Which request this is: the ids that clients and tracers send along, as far as they are fit."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from telemetry.trace_context import TraceContext, parse_traceparent

MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """What log lines, timelines and answers name a request by."""

    request_id: str
    """x-request-id of the request and its answer."""
    client_gave_id: bool
    trace: TraceContext | None
    """What the client's call is part of."""


def identify(headers: Mapping[bytes, bytes]) -> RequestIdentity:
    """Read x-request-id and traceparent; what is missing or unfit is made up, or left out."""
    given = _valid_request_id(headers.get(b"x-request-id", b""))
    trace = parse_traceparent(headers.get(b"traceparent", b""))
    return RequestIdentity(given or uuid.uuid4().hex, given is not None, trace)


def _valid_request_id(header: bytes) -> str | None:
    """The client's id if it is safe to log and to send back."""
    if not 0 < len(header) <= MAX_REQUEST_ID_CHARS:
        return None
    return header.decode() if all(0x20 < byte < 0x7F for byte in header) else None
