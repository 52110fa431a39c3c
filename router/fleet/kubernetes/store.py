"""The slices as of one resourceVersion, and what list and watch make of them. Pure.

Owned by the watch. Invariant: after a list, and after every event that was taken, `slices` is what
a fresh list at `version` would return.
"""

import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from http import HTTPStatus

from router.fleet.kubernetes.slices import Slice, parse_slice


class EventType(StrEnum):
    """What a line of a watch says."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"
    ERROR = "ERROR"


class GoneError(Exception):
    """The API server no longer has the changes after a resourceVersion: list again."""


class WatchError(Exception):
    """A watch said something that ends it."""


class SliceStore:
    """See the module."""

    def __init__(self) -> None:
        self.version = ""
        """Where the next watch goes on; empty if only a list can tell."""
        self._slices: dict[str, Slice] = {}

    @property
    def slices(self) -> Iterable[Slice]:
        """Every slice that is known."""
        return self._slices.values()

    def replace(self, items: Iterable[object], version: str) -> bool:
        """Take a complete list; True if workers differ from what was known."""
        parsed = [parse_slice(item) for item in items if isinstance(item, Mapping)]
        fresh = {each.name: each for each in parsed}
        changed = fresh != self._slices
        self._slices = fresh
        self.version = version
        return changed

    def forget_version(self) -> None:
        """Have the next turn list, and keep the slices until then."""
        self.version = ""

    def take(self, line: bytes) -> tuple[EventType, bool]:
        """Take one line of a watch; what it was, and whether it changed any worker.

        Raises:
            GoneError: what lies between `version` and now is gone.
            WatchError: the line is an error, or none that a watch may have.
        """
        try:
            event = json.loads(line)
            kind = EventType(event["type"])
            item = event["object"]
            if kind is EventType.ERROR:
                raise _failure(item)
            version = item["metadata"]["resourceVersion"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise WatchError(f"a line is no event of a watch: {error!r}") from None
        if not isinstance(version, str) or not version:
            raise WatchError("an event has no resourceVersion")
        changed = False
        if kind is not EventType.BOOKMARK:
            fresh = parse_slice(item)
            before = self._slices.get(fresh.name)
            if kind is EventType.DELETED:
                self._slices.pop(fresh.name, None)
                changed = before is not None
            else:
                self._slices[fresh.name] = fresh
                changed = before != fresh
        self.version = version
        return kind, changed


def _failure(status: Mapping[str, object]) -> Exception:
    if status.get("code") == HTTPStatus.GONE:
        return GoneError(str(status.get("message", "")))
    return WatchError(f"the API server ended it: {status.get('message', status)}")
