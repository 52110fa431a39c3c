"""KV transfer over plain TCP sockets: needs nothing but the standard library, host memory only.

One connection per peer, whose thread receives straight into the pool's blocks. Invariant: bytes
land only inside a call of that thread, so nothing is written once the thread has left it.
"""

import contextlib
import socket
from collections.abc import Sequence

from core.errors import TransferError
from kvtransfer import tcp_frames as frames
from kvtransfer.peer_reads import PeerPool, Peers, QueuedRead
from kvtransfer.pool_memory import block_slices, pool_view
from kvtransfer.tcp_server import TcpServer
from kvtransfer.transport import BlockPieces, BlockPool, Piece

CONNECT_TIMEOUT_S = 5.0
RECEIVE_TIMEOUT_S = 30.0
"""A peer that sends nothing for this long while a READ waits has lost it."""


class TcpChannel:
    """A connection to the pool of one peer; see `channel.Channel`."""

    def __init__(
        self,
        peer: frames.TcpMetadata,
        *,
        token: bytes,
        view: memoryview,
        block_bytes: int,
        pieces: Sequence[Piece],
    ) -> None:
        """Not connected yet. `view` is the own pool, [num_blocks * block_bytes]."""
        self._peer = peer
        self._token = token
        self._view = view
        self._block_bytes = block_bytes
        self._remote_runs = [(piece.remote_offset, piece.num_bytes) for piece in pieces]
        self._own_runs = [(piece.own_offset, piece.num_bytes) for piece in pieces]
        self._sock = frames.deadline_socket(peer.host, CONNECT_TIMEOUT_S)

    def open(self) -> bool:
        """Connect, shake hands and say what of each block is wanted."""
        self._sock.connect((self._peer.host, self._peer.port))
        frames.greet_as_client(self._sock, self._token, self._peer.pool_nonce)
        frames.send_runs(self._sock, self._remote_runs)
        self._sock.settimeout(RECEIVE_TIMEOUT_S)
        return False

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> None:
        """Ask for blocks and receive them into their places."""
        frames.send_request(self._sock, remote_ids)
        places = block_slices(self._view, own_ids, self._block_bytes, self._own_runs)
        frames.receive_reply(self._sock, places)

    def interrupt(self) -> None:
        """Wake whatever waits on the socket; in vain until `connect` has begun."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


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
        self._block_bytes = pool.layout.block_bytes
        self._server = TcpServer(pool, host=host, token=token)
        self._peers = Peers(pool)

    @property
    def name(self) -> str:
        """What both hellos must agree on."""
        return "tcp"

    def metadata(self) -> bytes:
        """Address, size and nonce of this pool."""
        return self._server.metadata.pack()

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        """Start connecting. If the peer can't be reached or refuses us, its READs fail."""
        peer = frames.TcpMetadata.unpack(metadata)

        def open_channel(checked: Sequence[Piece]) -> TcpChannel:
            return TcpChannel(
                peer,
                token=self._token,
                view=self._view,
                block_bytes=self._block_bytes,
                pieces=checked,
            )

        self._peers.add(peer_id, PeerPool(peer.num_blocks, peer.block_bytes), pieces, open_channel)

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> QueuedRead:
        """Queue a READ behind the peer's earlier ones."""
        return self._peers.read(peer_id, pairs, frames.MAX_BLOCKS_PER_READ)

    def disconnect(self, peer_id: str) -> None:
        """Shut the connection and wait for its thread, which that wakes at once."""
        self._peers.remove(peer_id)

    def close(self) -> None:
        """Disconnect all peers, stop serving."""
        self._peers.close()
        self._server.close()
