"""Makes a Mooncake engine's end quick. Called by `mooncake.py` for every new engine.

An engine's destructor waits for a thread that sits in accept() for up to a second, and holds the
interpreter's lock meanwhile, so the engine loop would stand still (0.3.13: 26 to 1010 ms; so 3 to
28 ms). Here its listening socket gets a shorter timeout. Invariant: Mooncake keeps its descriptor.
"""

import contextlib
import logging
import os
import socket
import stat
import struct

log = logging.getLogger(__name__)

_ACCEPT_TIMEOUT_US = 20_000


def shorten_accept(port: int) -> None:
    """Let whoever accepts on `port` in this process look up every 20 ms."""
    listener = _listener(port)
    if listener is None:
        log.warning("Mooncake's port %d was not found; ending an engine takes up to 1 s", port)
        return
    with listener:
        timeout = struct.pack("ll", 0, _ACCEPT_TIMEOUT_US)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    # The accept() under way still has the old timeout: end it by something to accept.
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()


def _listener(port: int) -> socket.socket | None:
    """A second descriptor of the socket of this process that listens on an IPv4 port."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd = int(name)
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            sock = socket.socket(fileno=os.dup(fd))
            if (
                sock.family == socket.AF_INET
                and sock.type == socket.SOCK_STREAM
                and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and sock.getsockname()[1] == port
            ):
                return sock
            sock.close()
    return None
