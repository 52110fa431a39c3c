"""Reads the bodies of requests: small ones at once, large ones beside the event loop.

Checking a megabyte takes as long as streaming thousands of tokens. In a thread it takes turns with
the event loop; a few threads of their own, so that bodies wait for bodies and for nothing else, nor
anything for them.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from router.api.parsing import parse_json

Result = TypeVar("Result")

INLINE_BYTES = 32 << 10
"""Larger bodies are read in a thread: this much takes about a millisecond."""
_AT_ONCE = 2


class BodyReader:
    """One serves all endpoints of a router."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bodies")

    async def read(self, body: bytes, check: Callable[[Mapping[str, Any]], Result]) -> Result:
        """Parse a body and check what it says.

        Args:
            body: JSON.
            check: makes a request of its fields; may be called in a thread.

        Raises:
            InvalidRequestError: it is no JSON object, holds too much, or `check` says so.
        """
        return await self.beside(len(body), lambda: check(parse_json(body)))

    async def beside(self, size: int, work: Callable[[], Result]) -> Result:
        """Do work on a body of `size` bytes, beside the event loop if that is much."""
        if size <= INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
