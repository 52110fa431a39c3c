"""Responses that are remembered, so that a later one can go on from them.

In this process only: another router, or this one started again, does not know them. Bounded by
number and by bytes; the one that was used the longest ago goes first.
"""

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


class ResponseStore:
    """Keeps the latest."""

    def __init__(self, *, capacity: int, capacity_bytes: int) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._bytes = 0

    def keep(self, response_id: str, response: StoredResponse) -> None:
        """Remember a response; one above the whole capacity is not kept at all."""
        self._stored[response_id] = response
        self._bytes += response.size
        while len(self._stored) > self._capacity or self._bytes > self._capacity_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._bytes -= oldest.size

    def get(self, response_id: str, caller: Caller, *, param: str | None = None) -> StoredResponse:
        """A response that is remembered.

        Raises:
            HttpError: 404; it is unknown, forgotten or another tenant's.
        """
        found = self._stored.get(response_id)
        if found is None or not caller.may_see(found.tenant):
            raise HttpError(
                404,
                ErrorCode.NOT_FOUND,
                f"Response {response_id[:128]!r} is not remembered here: it was not stored, was "
                "forgotten, or another router answered it.",
                param=param,
            )
        self._stored.move_to_end(response_id)
        return found

    def delete(self, response_id: str, caller: Caller) -> None:
        """Forget a response.

        Raises:
            HttpError: 404; it is unknown, forgotten or another tenant's.
        """
        self._bytes -= self.get(response_id, caller).size
        del self._stored[response_id]
