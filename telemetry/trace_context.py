"""Which trace a call belongs to, as its caller said in the header traceparent."""

import re
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The caller's span, to be the parent of ours."""

    trace_id: str
    """32 lowercase hexadecimal digits, not all zero."""
    span_id: str
    """16 of them."""
    sampled: bool
    """The caller keeps its part of the trace."""


def parse_traceparent(header: bytes) -> TraceContext | None:
    """Read the header; None if it is missing or unfit.

    Source: W3C Trace Context; a version above ours is read as far as ours goes.
    """
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None or not match[1].strip(b"0") or not match[2].strip(b"0"):
        return None
    return TraceContext(match[1].decode(), match[2].decode(), bool(int(match[3], 16) & _SAMPLED))
