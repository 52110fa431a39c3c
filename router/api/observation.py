"""GET endpoints that show the whole system: its workers and links, and the latest requests."""

from typing import Protocol
from urllib.parse import parse_qs

import orjson

from core.errors import InvalidRequestError
from router.api.errors import Headers
from router.api.exchange import Exchange

DEFAULT_REQUESTS = 50
MAX_REQUESTS = 500
FRESH: Headers = [(b"cache-control", b"no-store")]


class Observed(Protocol):
    """What there is to see; router/observer.py has it."""

    def fleet(self) -> dict[str, object]:
        """Workers and links, for JSON."""
        ...

    def requests(self, count: int) -> list[dict[str, object]]:
        """The latest requests, newest first, for JSON."""
        ...


class Observation:
    """Endpoints over what is observed."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    async def fleet(self, exchange: Exchange) -> None:
        """Every worker with its load, and every link with its speed."""
        await exchange.answer(orjson.dumps(self._observed.fleet()), headers=FRESH)

    async def requests(self, exchange: Exchange) -> None:
        """The latest requests; `?limit=` says how many.

        Raises:
            InvalidRequestError: the limit is no number from 1 to MAX_REQUESTS.
        """
        given = parse_qs(exchange.query.decode("latin-1"), keep_blank_values=True)
        text = given.get("limit", [str(DEFAULT_REQUESTS)])[-1]
        limit = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
        if not 1 <= limit <= MAX_REQUESTS:
            raise InvalidRequestError(
                f"limit must be a number from 1 to {MAX_REQUESTS}, got {text[:32]!r}.",
                param="limit",
            )
        body = {"object": "list", "data": self._observed.requests(limit)}
        await exchange.answer(orjson.dumps(body), headers=FRESH)
