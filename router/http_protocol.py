"""One HTTP connection with bounds that uvicorn leaves to a proxy: its head, its time, its number.

uvicorn makes one of these per connection. Refusals have the shape of the API's errors. Size and
time of bodies are the business of the endpoints that read them (router/api/exchange.py).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from core.errors import ErrorCode
from router.api.errors import HttpError, error_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a connection may take. Seconds and bytes."""

    max_connections: int = 4096
    head_timeout_s: float = 10.0
    """From a request's first byte, or the opening of the connection, to the end of its head."""
    head_bytes: int = 64 << 10
    """Request line and headers together."""
    max_headers: int = 128
    linger_s: float = 5.0
    """How long the rest of a body may arrive that was answered without being read."""
    flush_s: float = 60.0
    """How long a client may take nothing of what it is sent."""


SEND_NOW = "diptych.send_now"
"""Name of what this server adds to ASGI: a function that sends a part of a body, as bytes.

It returns True if that was possible without waiting, which is so while the peer takes what it is
sent and after the answer's head; else it sends nothing. Sending so takes no coroutine and no task.
"""


def send_now(extensions: dict[str, Any] | None) -> Callable[[bytes], bool]:
    """That function of one request; on any other server one that never can."""
    found: Callable[[bytes], bool] | None = (extensions or {}).get(SEND_NOW)
    return found or (lambda _: False)


class _HeadRefusedError(Exception):
    """The head of a request is out of bounds."""


class BoundedProtocol(HttpToolsProtocol):
    """See the module."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._turned_away = False
        self._refusal: HttpError | None = None
        self._in_head = True
        self._head_size = 0
        """Bytes that arrived of a head that is not whole."""
        self._parsed_size = 0
        """Of the request line and those headers that are."""
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and start the clock of its first head."""
        if len(self.connections) >= self._limits.max_connections:
            self._turned_away = True
            self.transport = transport
            self._refuse(
                HttpError(
                    503,
                    ErrorCode.UNAVAILABLE,
                    f"The router has {self._limits.max_connections} connections open, as many as "
                    "it takes; try again.",
                    headers=[(b"retry-after", b"1")],
                )
            )
            return
        super().connection_made(transport)
        self._start_timer(self._limits.head_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        self._stop_timer()
        self._stop_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, within bounds."""
        if self._turned_away or self.transport.is_closing():
            return
        if self._in_head:
            begins = self._head_size == 0
            self._head_size += len(data)
            if begins:
                self._start_timer(self._limits.head_timeout_s, self._head_is_late)
        super().data_received(data)
        # The parser tells of a header when it is complete; one without an end is only counted here.
        if self._in_head and self._head_size > self._limits.head_bytes:
            self._refusal = _too_large(self._limits)
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._parsed_size = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """The head is whole; what follows is the body."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            # The application runs in a task, which has not begun.
            extensions: dict[str, Any] = {SEND_NOW: partial(_send_now, self.cycle)}
            self.scope["extensions"] = extensions

    def on_message_complete(self) -> None:
        """The body is whole."""
        super().on_message_complete()
        self._in_head = True
        self._head_size = 0
        self._stop_timer()
        if self.cycle.response_complete:
            self._start_timer(self.timeout_keep_alive, self._head_is_late)

    def on_response_complete(self) -> None:
        """The answer is out; what is left of its request, or was begun of the next, must come."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_flush_in_time()
            return
        if not self.cycle.response_complete:
            return
        if not self._in_head:
            self._start_timer(self._limits.linger_s, self._close)
        elif self._head_size:
            self._start_timer(self._limits.head_timeout_s, self._head_is_late)

    def pause_writing(self) -> None:
        """The peer does not take what it is sent."""
        super().pause_writing()
        self._stop_stall()
        self._stall = self.loop.call_later(self._limits.flush_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        self._stop_stall()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """No other request came."""
        super().timeout_keep_alive_handler()
        self._end_flush_in_time()

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed, in the API's shape, and close."""
        refusal = self._refusal or HttpError(
            400, ErrorCode.INVALID_REQUEST, "This is not a valid HTTP request."
        )
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer is under way: another one would be taken for its end
            return
        self._refuse(refusal)

    def _count(self, size: int) -> None:
        self._parsed_size += size
        limits = self._limits
        if self._parsed_size > limits.head_bytes or len(self.headers) > limits.max_headers:
            self._refusal = _too_large(limits)
            raise _HeadRefusedError  # the parser stops, and uvicorn asks for the refusal

    def _close(self) -> None:
        self.transport.close()
        self._end_flush_in_time()

    def _end_flush_in_time(self) -> None:
        """A transport that is closed waits for its last byte to be taken, for ever if it must."""
        if self.transport.get_write_buffer_size():
            self._start_timer(self._limits.flush_s, self.transport.abort)

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # a stray line break behind a body, as old clients send, harms nobody
        if self._head_size == 0:
            self._close()
            return
        self._refuse(
            HttpError(
                408,
                ErrorCode.DEADLINE,
                f"The request's headers did not arrive within {self._limits.head_timeout_s:g} s.",
            )
        )

    def _refuse(self, error: HttpError) -> None:
        self._stop_timer()
        answer = error_answer(error)
        body = answer.json()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *answer.headers,
        ]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[answer.status], head, body))
        self._close()

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _start_timer(self, delay_s: float, callback: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(delay_s, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _send_now(cycle: RequestResponseCycle, data: bytes) -> bool:
    can = cycle.chunked_encoding and not (
        cycle.flow.write_paused or cycle.disconnected or cycle.response_complete
    )
    if can:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return bool(can)


def _too_large(limits: ConnectionLimits) -> HttpError:
    return HttpError(
        431,
        "request_headers_too_large",
        f"The request line and headers are larger than {limits.head_bytes} bytes, or more than "
        f"{limits.max_headers}.",
    )
