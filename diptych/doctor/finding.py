"""What a check found. Checks are pure functions from facts to findings."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    SKIP = "skip"
    """Not looked at; the message says why."""
    WARN = "warn"
    """It works, but slower or less safely than it could."""
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    message: str
    remedy: str = ""
    """What to do; only of WARN and FAIL."""


def ok(check: str, message: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.OK, message=message)


def skip(check: str, message: str) -> Finding:
    """Not looked at."""
    return Finding(check=check, level=Level.SKIP, message=message)


def warn(check: str, message: str, remedy: str) -> Finding:
    """It could be better."""
    return Finding(check=check, level=Level.WARN, message=message, remedy=remedy)


def fail(check: str, message: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(check=check, level=Level.FAIL, message=message, remedy=remedy)
