"""Responses that are remembered, so that a later one can go on from them.

In this process only: another router, or this one started again, does not know them. Bounded by
number and by bytes: of the tenant that has the most, the one that was used the longest ago goes, so
that no tenant makes others' be forgotten. Any thread may ask, since bodies are read in threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ErrorCode
from router.access.caller import Caller
from router.api.errors import HttpError
from router.api.messages import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response that has ended."""

    tenant: str
    """Whose it is."""
    body: bytes
    """Its JSON."""
    messages: Sequence[Message]
    """The conversation without instructions, its output included."""
    size: int
    """Bytes that it counts for."""


@dataclass(slots=True)
class _Share:
    """What one tenant has of the store."""

    count: int = 0
    bytes: int = 0


class ResponseStore:
    """Keeps the latest."""

    def __init__(self, *, capacity: int, capacity_bytes: int) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._held: dict[str, _Share] = {}
        """Of each tenant that has any."""
        self._lock = threading.RLock()

    def keep(self, response_id: str, response: StoredResponse) -> None:
        """Remember a response; one above the whole capacity is not kept at all."""
        with self._lock:
            self._stored[response_id] = response
            share = self._held.setdefault(response.tenant, _Share())
            share.count += 1
            share.bytes += response.size
            while self._overfull():
                most = max(self._held, key=self._weight)
                oldest = next(i for i, each in self._stored.items() if each.tenant == most)
                self._forget(oldest)

    def get(self, response_id: str, caller: Caller, *, param: str | None = None) -> StoredResponse:
        """A response that is remembered.

        Raises:
            HttpError: 404; it is unknown, forgotten or another tenant's.
        """
        with self._lock:
            found = self._stored.get(response_id)
            if found is not None and caller.may_see(found.tenant):
                self._stored.move_to_end(response_id)
                return found
        raise HttpError(
            404,
            ErrorCode.NOT_FOUND,
            f"Response {response_id[:128]!r} is not remembered here: it was not stored, was "
            "forgotten, or another router answered it.",
            param=param,
        )

    def delete(self, response_id: str, caller: Caller) -> None:
        """Forget a response.

        Raises:
            HttpError: 404; it is unknown, forgotten or another tenant's.
        """
        with self._lock:
            self.get(response_id, caller)
            self._forget(response_id)

    def _overfull(self) -> bool:
        held = sum(share.bytes for share in self._held.values())
        return len(self._stored) > self._capacity or held > self._capacity_bytes

    def _weight(self, tenant: str) -> float:
        share = self._held[tenant]
        return max(share.count / self._capacity, share.bytes / self._capacity_bytes)

    def _forget(self, response_id: str) -> None:
        gone = self._stored.pop(response_id)
        share = self._held[gone.tenant]
        share.count -= 1
        share.bytes -= gone.size
        if not share.count:
            del self._held[gone.tenant]
