"""One peer, one thread, its READs in order: what the transports of this package are built on.

The engine loop queues READs and looks at them; the thread connects, reads and waits. Invariant:
only the peer's thread causes writes into the pool, and a READ becomes FAILED only after the channel
was closed, so nothing is written afterwards.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.clock import monotonic
from core.errors import TransferError
from kvtransfer.pool_memory import check_distinct, check_ids, checked_pieces
from kvtransfer.transport import BlockPieces, BlockPool, Piece, ReadState

log = logging.getLogger(__name__)

MAX_QUEUED_READS = 1024
_JOIN_STEP_S = 0.01


class Channel(Protocol):
    """A way to one peer's pool. Used by one thread, but for `interrupt`."""

    def open(self) -> None:
        """Connect, waiting at most a few seconds."""
        ...

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> None:
        """Copy blocks; returns when every byte is here.

        Raises:
            TransferError or OSError: it can't go on; the channel is of no more use.
        """
        ...

    def interrupt(self) -> None:
        """Make `open` and `read` raise soon. From another thread; repeated until they did."""
        ...

    def close(self) -> None:
        """Cut the connection. On return nothing that was asked for can land any more."""
        ...


class QueuedRead:
    """One READ. Ended by the peer's thread, polled by the engine loop."""

    __slots__ = ("duration_s", "error", "own_ids", "remote_ids", "state")

    def __init__(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> None:
        """PENDING from here on."""
        self.remote_ids = remote_ids
        self.own_ids = own_ids
        self.state = ReadState.PENDING
        self.error = ""
        self.duration_s = 0.0

    def poll(self) -> ReadState:
        """Look, don't wait."""
        return self.state

    def finish(self, error: str) -> None:
        """End it, once; `error` empty means that all bytes are here."""
        if self.state is ReadState.PENDING:
            self.error = error
            self.state = ReadState.FAILED if error else ReadState.DONE


class PeerReads:
    """The READs from one peer and the thread that does them."""

    def __init__(self, peer_id: str, channel: Channel) -> None:
        """Start connecting."""
        self._peer_id = peer_id
        self._channel = channel
        self._queue: queue.Queue[QueuedRead | None] = queue.Queue(MAX_QUEUED_READS)
        self._lock = threading.Lock()
        self._closed = False
        self._failure = ""
        """Set once nothing can land any more."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-read", daemon=True)
        self._thread.start()

    def submit(self, read: QueuedRead) -> None:
        """Queue a READ behind the earlier ones.

        Raises:
            TransferError: too many wait already, or the connection is lost.
        """
        if self._failure:
            raise TransferError(self._failure)
        try:
            self._queue.put_nowait(read)
        except queue.Full:
            raise TransferError(
                f"{MAX_QUEUED_READS} READs wait for peer {self._peer_id} already."
            ) from None
        if self._failure:
            self._fail_queued()

    def close(self) -> None:
        """Fail what is pending; returns when the thread has ended, which takes milliseconds."""
        self._closing = True
        while self._thread.is_alive():
            with self._lock:
                if not self._closed:
                    self._channel.interrupt()
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(_JOIN_STEP_S)
        self._fail_queued()

    def _run(self) -> None:
        read: QueuedRead | None = None
        failure = "the peer was disconnected"
        try:
            self._channel.open()
            while not self._closing and (read := self._queue.get()) is not None:
                started_at = monotonic()
                self._channel.read(read.remote_ids, read.own_ids)
                read.duration_s = monotonic() - started_at
                read.finish("")
        except (OSError, TransferError) as error:
            failure = str(error) or repr(error)
        except Exception as error:
            log.exception("a KV channel failed in an unknown way")
            failure = repr(error)
        with self._lock:
            self._closed = True
        self._channel.close()
        self._failure = f"Peer {self._peer_id} is lost: {failure}"
        if read is not None:
            read.finish(self._failure)
        self._fail_queued()

    def _fail_queued(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                read = self._queue.get_nowait()
                if read is not None:
                    read.finish(self._failure)


@dataclass(frozen=True, slots=True)
class PeerPool:
    """Size of a peer's pool, as its metadata tell."""

    num_blocks: int
    block_bytes: int


class Peers:
    """Every peer that one transport is connected to, with the checks that all transports share."""

    def __init__(self, pool: BlockPool) -> None:
        """For READs into `pool`."""
        self._num_blocks = pool.num_blocks
        self._block_bytes = pool.layout.block_bytes
        self._peers: dict[str, tuple[PeerPool, PeerReads]] = {}

    def add(
        self,
        peer_id: str,
        pool: PeerPool,
        pieces: BlockPieces | None,
        open_channel: Callable[[tuple[Piece, ...]], Channel],
    ) -> None:
        """Start connecting to a peer, of whose blocks these pieces are read.

        Raises:
            TransferError: that name is taken, or the pieces do not fit both sides' blocks.
        """
        if peer_id in self._peers:
            raise TransferError(f"Peer {peer_id} is connected already.")
        checked = checked_pieces(self._block_bytes, pool.block_bytes, pieces)
        self._peers[peer_id] = (pool, PeerReads(peer_id, open_channel(checked)))

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]], most: int) -> QueuedRead:
        """Queue a READ of up to `most` blocks: (peer's block id, own block id) each.

        Raises:
            TransferError: the peer or a block is unknown, or an own block is named twice.
        """
        peer = self._peers.get(peer_id)
        if peer is None:
            raise TransferError(f"Peer {peer_id} is not connected.")
        if not 0 < len(pairs) <= most:
            raise TransferError(f"A READ moves 1 to {most} blocks, not {len(pairs)}.")
        pool, reads = peer
        remote_ids = [remote for remote, _ in pairs]
        own_ids = [own for _, own in pairs]
        check_ids(remote_ids, pool.num_blocks, "the peer's")
        check_ids(own_ids, self._num_blocks, "our")
        check_distinct(own_ids)
        read = QueuedRead(remote_ids, own_ids)
        reads.submit(read)
        return read

    def remove(self, peer_id: str) -> None:
        """Drop a peer; its READs are FAILED on return. Nothing to do for an unknown one."""
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            peer[1].close()

    def close(self) -> None:
        """Drop all."""
        for peer_id in list(self._peers):
            self.remove(peer_id)
