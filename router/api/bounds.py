"""How much a JSON body may hold, found by counting bytes: before it is parsed, in milliseconds.

A body of a few megabytes can hold millions of things, each of which costs a thousand times what its
bytes cost to receive; parsing is one call, during which this process does nothing else.
"""

from core.errors import InvalidRequestError

MAX_CONTAINERS = 100_000
"""Most arrays and objects. Each takes microseconds to check, and real bodies hold a dozen for each
of their messages and tools."""
MAX_STRINGS = 250_000
"""Most strings, the names of fields among them: 30 for each of as many messages as are taken."""
MAX_VALUES = 2_500_000
"""Most values of any kind: token ids of all prompts, above all; of five digits they fill 15 MB."""


def check_bounds(body: bytes) -> int:
    """Refuse a body that holds too much.

    Args:
        body: JSON in UTF-8, or anything else; then what its parser sees before it stops is counted.

    Returns:
        At most how many arrays and objects there are.

    Raises:
        InvalidRequestError: says of what there is too much.
    """
    opened, strings, commas = _opened(body), body.count(b'"') // 2, body.count(b",")
    if _fits(opened, strings, commas):
        return opened
    # Most of that may be inside strings. What is escaped there goes first, so that what quotes are
    # left begin and end them.
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = body.count(b'"') // 2
    _check(strings, MAX_STRINGS, "strings and names of fields")
    outside = b"".join(body.split(b'"')[::2])
    opened, commas = _opened(outside), outside.count(b",")
    _check(opened, MAX_CONTAINERS, "arrays and objects")
    _check(opened + commas, MAX_VALUES, "values")
    return opened


def _opened(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _fits(opened: int, strings: int, commas: int) -> bool:
    # A value is the first of what it is in, or follows a comma.
    return opened <= MAX_CONTAINERS and strings <= MAX_STRINGS and opened + commas <= MAX_VALUES


def _check(count: int, most: int, what: str) -> None:
    if count > most:
        raise InvalidRequestError(
            f"The body holds {count} {what}, and at most {most} are taken; divide it among several "
            "requests, or send prompts as text."
        )
