"""KV transfer over plain TCP sockets: needs nothing but the standard library, host memory only.

One connection and one reader thread per peer; the thread receives straight into the pool's blocks.
Invariant: only a peer's own reader thread writes for it, and `disconnect` returns after that thread
has ended, so nothing is written afterwards. Every wait of the thread ends when its socket is shut.
"""

import contextlib
import queue
import socket
import threading
from collections.abc import Sequence

from core.errors import TransferError
from kvtransfer import tcp_frames as frames
from kvtransfer.pool_memory import block_slices, check_distinct, check_ids, pool_view
from kvtransfer.tcp_server import TcpServer
from kvtransfer.transport import BlockPool, ReadState

CONNECT_TIMEOUT_S = 5.0
RECEIVE_TIMEOUT_S = 30.0
"""A peer that sends nothing for this long while a READ waits has lost it."""
MAX_QUEUED_READS = 1024
_JOIN_STEP_S = 0.01


class TcpRead:
    """One READ over TCP. Written by the reader thread, polled by the engine loop."""

    __slots__ = ("error", "into", "remote_ids", "state")

    def __init__(self, remote_ids: Sequence[int], into: list[memoryview]) -> None:
        self.remote_ids = remote_ids
        self.into = into
        self.state = ReadState.PENDING
        self.error = ""

    def poll(self) -> ReadState:
        """Look, don't wait."""
        return self.state

    def finish(self, error: str) -> None:
        """End it, once; `error` empty means that all bytes are here."""
        if self.state is ReadState.PENDING:
            self.into = []
            self.error = error
            self.state = ReadState.FAILED if error else ReadState.DONE


class _Peer:
    """The connection to one peer's pool and the thread that reads from it."""

    def __init__(self, metadata: frames.TcpMetadata, token: bytes) -> None:
        self.metadata = metadata
        self._token = token
        self._reads: queue.Queue[TcpRead | None] = queue.Queue(MAX_QUEUED_READS)
        self._failure = ""
        self._closing = False
        self._sock = frames.deadline_socket((metadata.host, metadata.port), CONNECT_TIMEOUT_S)
        self._thread = threading.Thread(target=self._run, name="kv-tcp-read", daemon=True)
        self._thread.start()

    def submit(self, read: TcpRead) -> None:
        if self._failure:
            raise TransferError(self._failure)
        try:
            self._reads.put_nowait(read)
        except queue.Full:
            raise TransferError(
                f"{MAX_QUEUED_READS} READs wait for {self.metadata.host} already."
            ) from None
        if self._failure:
            self._fail_queued()

    def close(self) -> None:
        self._closing = True
        self._failure = self._failure or "the peer was disconnected"
        while self._thread.is_alive():
            # Again and again, since a socket can't be shut before connect() has begun.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(queue.Full):
                self._reads.put_nowait(None)
            self._thread.join(_JOIN_STEP_S)
        self._sock.close()
        self._fail_queued()

    def _run(self) -> None:
        read: TcpRead | None = None
        try:
            self._sock.connect((self.metadata.host, self.metadata.port))
            frames.greet_as_client(self._sock, self._token, self.metadata.pool_nonce)
            self._sock.settimeout(RECEIVE_TIMEOUT_S)
            while not self._closing:
                read = self._reads.get()
                if read is None:
                    break
                frames.send_request(self._sock, read.remote_ids)
                frames.receive_reply(self._sock, read.into)
                read.finish("")
        except (OSError, TransferError) as error:
            where = f"{self.metadata.host}:{self.metadata.port}"
            self._failure = self._failure or f"KV transport to {where}: {error}"
        finally:
            self._failure = self._failure or "the peer was disconnected"
            if read is not None:
                read.finish(self._failure)
            self._fail_queued()

    def _fail_queued(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                read = self._reads.get_nowait()
                if read is not None:
                    read.finish(self._failure)


class TcpTransport:
    """`transport.Transport` over sockets."""

    def __init__(self, pool: BlockPool, *, host: str, token: bytes) -> None:
        """Serve `pool` on `host`, an IP address that peers can reach.

        Raises:
            TransferError: the pool is not in host memory, or `host` can't be listened on.
        """
        if pool.device_id is not None:
            raise TransferError(
                f"The tcp transport moves host memory only, the pool is on CUDA device "
                f"{pool.device_id}; use the nixl transport."
            )
        self._token = token
        self._view = pool_view(pool)
        self._num_blocks = pool.num_blocks
        self._block_bytes = pool.layout.block_bytes
        self._server = TcpServer(pool, host=host, token=token)
        self._peers: dict[str, _Peer] = {}

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "tcp"

    def metadata(self) -> bytes:
        """Address, size and nonce of this pool."""
        return self._server.metadata.pack()

    def connect(self, peer_id: str, metadata: bytes) -> None:
        """Start connecting. If the peer can't be reached or refuses us, its READs fail."""
        if peer_id in self._peers:
            raise TransferError(f"Peer {peer_id} is connected already.")
        peer = frames.TcpMetadata.unpack(metadata)
        if peer.block_bytes != self._block_bytes:
            raise TransferError(
                f"Blocks of peer {peer_id} hold {peer.block_bytes} bytes, ours {self._block_bytes}."
            )
        self._peers[peer_id] = _Peer(peer, self._token)

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> TcpRead:
        """Queue a READ behind the peer's earlier ones."""
        peer = self._peers.get(peer_id)
        if peer is None:
            raise TransferError(f"Peer {peer_id} is not connected.")
        if not 0 < len(pairs) <= frames.MAX_BLOCKS_PER_READ:
            raise TransferError(
                f"A READ moves 1 to {frames.MAX_BLOCKS_PER_READ} blocks, not {len(pairs)}."
            )
        remote_ids = [remote for remote, _ in pairs]
        own_ids = [own for _, own in pairs]
        check_ids(remote_ids, peer.metadata.num_blocks, "the peer's")
        check_ids(own_ids, self._num_blocks, "our")
        check_distinct(own_ids)
        read = TcpRead(remote_ids, block_slices(self._view, own_ids, self._block_bytes))
        peer.submit(read)
        return read

    def disconnect(self, peer_id: str) -> None:
        """Shut the connection and wait for its reader thread, which that wakes at once."""
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            peer.close()

    def close(self) -> None:
        """Disconnect all peers, stop serving."""
        for peer_id in list(self._peers):
            self.disconnect(peer_id)
        self._server.close()
