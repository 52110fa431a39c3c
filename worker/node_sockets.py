"""What an engine whose ranks lie on several nodes inherits: a socket for each node, and a port.

Made in the leader's service process before its engine is started. Frames of a node's ranks go
through the node's socket, whose other end `leading.py` joins to the node's stream; ranks of all
nodes find each other at the port.
"""

import secrets
import socket
from collections.abc import Sequence

from core.errors import ConfigError
from rpc.v1 import ipc_pb2

_BACKLOG = 128


class EngineEnds:
    """The engine's ends of the nodes' sockets, and the socket at which ranks meet."""

    def __init__(self, ends: Sequence[socket.socket], listener: socket.socket) -> None:
        self._sockets = [*ends, listener]
        self.message = ipc_pb2.OtherNodes(
            pipe_fds=[end.fileno() for end in ends],
            listen_fd=listener.fileno(),
            rendezvous_port=listener.getsockname()[1],
            rendezvous_name=secrets.token_hex(16),
        )

    @property
    def fds(self) -> tuple[int, ...]:
        """To be inherited by the engine process, under these numbers."""
        return tuple(sock.fileno() for sock in self._sockets)

    def close(self) -> None:
        """The engine process has its own. Idempotent."""
        for sock in self._sockets:
            sock.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket at which ranks meet; port 0 takes a free one.

    Raises:
        ConfigError: the port can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"Ranks can't meet at {host}:{port}: {error.strerror}. Choose another rendezvous_port."
        ) from None
