"""A TCP proxy between two processes that can turn into a black hole, at once or at a chosen byte.

A black hole closes nothing and refuses nothing: what is sent waits, as when a network drops every
packet and TCP sends them again. Once mended, everything that waited arrives, in order.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 1 << 16
_JOIN_S = 5.0


class Proxy:
    """Forwards connections to `target`, both ways."""

    def __init__(
        self,
        listener: socket.socket,
        target: tuple[str, int],
        edit: Callable[[bytes], bytes],
    ) -> None:
        self.target = target
        """May be changed, for connections to come."""
        self.num_answered = 0
        """Bytes that the target has answered so far."""
        self.delay_s = 0.0
        """How late every piece of data comes, either way."""
        self._refusing = False
        self._listener = listener
        self._edit = edit
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._dark = threading.Event()
        self._budget: int | None = None
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._start(self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._listener.getsockname()
        return host, port

    def black_hole(self) -> None:
        """Let nothing through any more, in old connections and in new ones."""
        with self._lock:
            self._flowing.clear()
            self._dark.set()

    def black_hole_after(self, num_bytes: int) -> None:
        """Become one when the target has answered so many more bytes, over all connections."""
        with self._lock:
            self._budget = num_bytes

    def refuse(self) -> None:
        """Cut every connection and every new one, until `mend`."""
        with self._lock:
            self._refusing = True
            for one in self._sockets:
                _cut(one)

    def wait_dark(self, timeout_s: float) -> None:
        """Until it is a black hole."""
        assert self._dark.wait(timeout_s), f"the target did not answer enough in {timeout_s} s"

    def mend(self) -> None:
        """Let everything through again, what waited first."""
        with self._lock:
            self._budget = None
            self._refusing = False
            self._dark.clear()
            self._flowing.set()

    def close(self) -> None:
        """Cut every connection and end."""
        with self._lock:
            self._closed = True
            self._flowing.set()
            for one in (self._listener, *self._sockets):
                _cut(one)
        for thread in self._threads:
            thread.join(_JOIN_S)
            assert not thread.is_alive(), "a proxy's thread did not end"
        for one in (self._listener, *self._sockets):
            one.close()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket()
            with self._lock:
                self._sockets += [near, far]
                if self._closed:
                    return
                refused = self._refusing
            if refused:
                _cut(near)
                continue
            try:
                far.connect(self.target)
            except OSError:
                _cut(near)
                continue
            self._start(self._pump, near, far, False)
            self._start(self._pump, far, near, True)

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(_CHUNK_BYTES):
                for part in self._parts(self._edit(data)) if counted else (data,):
                    self._flowing.wait()
                    time.sleep(self.delay_s)
                    sink.sendall(part)
            self._flowing.wait()
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _cut(source)
            _cut(sink)

    def _parts(self, data: bytes) -> Iterator[bytes]:
        """The bytes up to where darkness falls, which it does between the two, and the rest."""
        with self._lock:
            before = len(data) if self._budget is None else min(self._budget, len(data))
            self.num_answered += before
            if self._budget is not None:
                self._budget -= before
        yield data[:before]
        if self._budget == 0 and not self._dark.is_set():
            self.black_hole()
        if before < len(data):
            yield data[before:]


def _cut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(
    listen: tuple[str, int],
    target: tuple[str, int],
    edit: Callable[[bytes], bytes] = bytes,
) -> Iterator[Proxy]:
    """A proxy for the length of the block.

    Args:
        listen: host and port; 0 takes a free one.
        target: it need not listen yet.
        edit: what the target answers, chunk by chunk, and what the other side gets instead.
    """
    running = Proxy(socket.create_server(listen), target, edit)
    try:
        yield running
    finally:
        running.close()
