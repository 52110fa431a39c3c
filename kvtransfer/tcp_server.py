"""Serves one block pool over TCP: the passive end of `tcp.py`.

One thread accepts, one thread serves each connection; the engine loop never waits for either, since
sending releases the interpreter. Invariant: after `close` no thread touches the pool any more.
"""

import contextlib
import logging
import secrets
import socket
import threading
import time

from core.errors import TransferError
from kvtransfer import tcp_frames as frames
from kvtransfer.pool_memory import block_slices, check_ids, pool_view
from kvtransfer.transport import BlockPool

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
_HANDSHAKE_TIMEOUT_S = 5.0
_SEND_TIMEOUT_S = 30.0
"""A reader that takes nothing for this long is cut off."""
_BACKLOG = 128
_ACCEPT_PAUSE_S = 0.05
"""Between failing accepts, which out of descriptors would spin."""


class TcpServer:
    """Answers READs of a pool until closed."""

    def __init__(self, pool: BlockPool, *, host: str, token: bytes) -> None:
        """Listen on a free port of `host`, an IP address of this machine.

        Raises:
            TransferError: it can't be listened on.
        """
        self._view = pool_view(pool)
        self._block_bytes = pool.layout.block_bytes
        self._num_blocks = pool.num_blocks
        self._token = token
        self._nonce = secrets.token_bytes(frames.NONCE_BYTES)
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._closed = False
        self._listener = _listen(host)
        self._metadata = frames.TcpMetadata(
            host=host,
            port=self._listener.getsockname()[1],
            pool_nonce=self._nonce,
            num_blocks=pool.num_blocks,
            block_bytes=pool.layout.block_bytes,
        )
        self._acceptor = threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True)
        self._acceptor.start()

    @property
    def metadata(self) -> frames.TcpMetadata:
        """Where and what is served."""
        return self._metadata

    def close(self) -> None:
        """Stop serving; on return the pool's memory may go away. Idempotent."""
        with self._lock:
            self._closed = True
            threads = list(self._connections)
            for sock in self._connections.values():
                _shut(sock)
        _shut(self._listener)
        self._acceptor.join()
        self._listener.close()
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warning("A KV reader could not be accepted: %s", error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock,), name="kv-tcp-serve", daemon=True
            )
            with self._lock:
                accepted = not self._closed and len(self._connections) < MAX_CONNECTIONS
                if accepted:
                    self._connections[thread] = sock
                    thread.start()
            if not accepted:
                log.warning("A KV reader was turned away, %d are connected", MAX_CONNECTIONS)
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            frames.tune(sock)
            sock.settimeout(_HANDSHAKE_TIMEOUT_S)
            frames.greet_as_server(sock, self._token, self._nonce)
            runs = frames.receive_runs(sock, self._block_bytes)
            while (ids := frames.receive_request(sock, _SEND_TIMEOUT_S)) is not None:
                try:
                    check_ids(ids, self._num_blocks, "the peer's")
                except TransferError as error:
                    frames.send_error(sock, error.message)
                else:
                    slices = block_slices(self._view, ids, self._block_bytes, runs)
                    frames.send_reply(sock, slices)
        except (OSError, TransferError) as error:
            if not self._closed:
                log.info("A KV reader's connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
            sock.close()


def _listen(host: str) -> socket.socket:
    with contextlib.ExitStack() as stack:
        try:
            sock = stack.enter_context(frames.deadline_socket(host, _HANDSHAKE_TIMEOUT_S))
            sock.settimeout(None)
            sock.bind((host, 0))
            sock.listen(_BACKLOG)
        except (OSError, ValueError) as error:
            raise TransferError(
                f"Can't serve KV blocks on {host!r}: {error}; use an IP address of this machine."
            ) from error
        stack.pop_all()
        return sock


def _shut(sock: socket.socket) -> None:
    """Wake whoever waits on it, without closing the descriptor under them."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
