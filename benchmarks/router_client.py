"""Reads many streams of completions at once and notes when each piece of them came.

One thread, one epoll, no parsing while streams run: the client must cost less than a server does.
"""

import json
import re
import select
import socket
import time
from dataclasses import dataclass, field

from benchmarks.router_worker import MODEL, PROMPT, TICKS, TICKS_PER_S, text_of

_TEXT = re.compile(rb'"text":"((?:\d{5} )+)"')
_READ_BYTES = 1 << 18


@dataclass(slots=True)
class Received:
    """One stream's bytes, and up to where they had come when."""

    data: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[int, float]] = field(default_factory=list)
    """Bytes so far, and the moment on the monotonic clock."""

    def tokens_and_events(self) -> tuple[int, int]:
        """How many tokens came, and how many events had text."""
        texts = _TEXT.findall(_body(self.data))
        return sum(map(len, texts)) // len(text_of(0)), len(texts)

    def latencies_s(self) -> list[float]:
        """Of each token, from when it was made to when it was here.

        Without the few whose text is cut by the framing of the answer.
        """
        found, arrivals = [], iter(self.arrivals)
        size, moment = next(arrivals)
        for match in _TEXT.finditer(self.data):
            while size < match.end():
                size, moment = next(arrivals)
            for made in match[1].split():
                ticks = (moment * TICKS_PER_S - int(made)) % TICKS
                found.append(ticks / TICKS_PER_S)
        return found


def _body(answer: bytearray) -> bytes:
    """An answer without its head and the framing of its chunks, as far as it has come."""
    parts, at = [], answer.index(b"\r\n\r\n") + 4
    while (end := answer.find(b"\r\n", at)) >= 0:
        size = int(answer[at:end], 16)
        parts.append(answer[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)


class Streams:
    """Streams of one server, all open at once."""

    def __init__(self, port: int, count: int, tokens: int) -> None:
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, Received]] = {}
        self.received: list[Received] = []
        body = json.dumps(
            {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "stream": True}
        ).encode()
        request = (
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            connection.setblocking(False)
            received = Received()
            self.received.append(received)
            self._open[connection.fileno()] = connection, received
            self._poll.register(connection.fileno(), select.EPOLLIN)

    def read(self, until: float, every_s: float = 0.0) -> bool:
        """Read until all have ended, or a moment has come; True if all have ended.

        Args:
            until: on the monotonic clock.
            every_s: look this seldom; 0: be woken by each piece, which costs who sends it.
        """
        while self._open:
            time.sleep(every_s)
            left_s = until - time.monotonic()
            if left_s <= 0:
                return False
            for number, _ in self._poll.poll(left_s):
                connection, received = self._open[number]
                data = connection.recv(_READ_BYTES)
                if not data:
                    self._close(number)
                    continue
                received.data += data
                received.arrivals.append((len(received.data), time.monotonic()))
        return True

    def forget(self) -> None:
        """Drop what came so far."""
        for received in self.received:
            received.data.clear()
            received.arrivals.clear()

    def close(self) -> None:
        """Leave those that have not ended."""
        for number in list(self._open):
            self._close(number)
        self._poll.close()

    def _close(self, number: int) -> None:
        connection, _ = self._open.pop(number)
        self._poll.unregister(number)
        connection.close()
