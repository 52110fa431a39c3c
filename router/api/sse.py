"""A stream of server-sent events as the answer to one request.

Invariant: nothing is buffered; the status line goes out with the first event, so that a failure
before it still gets its own status; comments fill silences so that proxies keep the stream open.
"""

import asyncio
import contextlib
from collections.abc import Callable

from core.clock import Clock
from router.api.errors import ErrorAnswer
from router.api.exchange import Exchange

KEEP_ALIVE = b": keep-alive\n\n"


class EventStream:
    """Written to by the tasks of one request."""

    def __init__(self, exchange: Exchange, *, clock: Clock, keep_alive_s: float) -> None:
        self._exchange = exchange
        self._send_now = exchange.send_now
        self._clock = clock
        self._keep_alive_s = keep_alive_s
        self._starting = asyncio.Lock()
        self._begun = False
        """The status line is out."""
        self._num_writing = 0
        self._last_write_at = clock()
        self._open = False
        self._failure: Callable[[ErrorAnswer], bytes] = _error_event

    @property
    def started(self) -> bool:
        """True once the client was told that events follow."""
        return self._open and self._exchange.started

    def open(self, failure: Callable[[ErrorAnswer], bytes]) -> None:
        """From now on the answer is a stream, even if the first thing in it is a comment.

        Args:
            failure: makes the events that end it if it can't go on.
        """
        self._open = True
        self._failure = failure

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send whole events."""
        self._num_writing += 1
        try:
            if not self._begun:
                await self._begin()
            # Sent whole: a server waits before it takes a message, never within one.
            await self._exchange.send(
                {"type": "http.response.body", "body": data, "more_body": not last}
            )
        finally:
            self._num_writing -= 1
        self._last_write_at = self._clock()

    def write_now(self, data: bytes, now: float) -> bool:
        """Send whole events if that takes no waiting; False if nothing was sent.

        Args:
            data: the events.
            now: on the stream's clock, which is not asked per token.
        """
        send_now = self._send_now
        if self._begun and send_now(data):
            self._last_write_at = now
            return True
        return False

    async def keep_alive(self) -> float:
        """Send a comment if the stream was silent for long.

        Returns:
            Seconds until it may be needed again.
        """
        if not self._open or self._num_writing:
            return self._keep_alive_s
        silent_s = self._clock() - self._last_write_at
        if silent_s < self._keep_alive_s:
            return self._keep_alive_s - silent_s
        # A client that reads slowly has no silence to fill: its stream is full.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._keep_alive_s):
                await self.write(KEEP_ALIVE)
        return self._keep_alive_s

    async def fail(self, error: ErrorAnswer, *, patience_s: float) -> None:
        """End the stream with an error, if the client takes it within `patience_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.write(self._failure(error), last=True)

    async def _begin(self) -> None:
        async with self._starting:
            if not self._begun:
                await self._exchange.start(
                    200,
                    b"text/event-stream; charset=utf-8",
                    [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")],
                )
                self._begun = True


def _error_event(error: ErrorAnswer) -> bytes:
    return b"data: %b\n\n" % error.json()
