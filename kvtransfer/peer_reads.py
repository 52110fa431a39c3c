"""One peer, one thread, its READs in order: what the transports of this package are built on.

The engine loop queues READs and looks at them; the thread connects, reads and waits. Where reading
needs no waiting, as between GPUs, the loop itself starts the copies once the thread has connected:
a thread of its own would have to wait for the interpreter's lock, longest when most is decoded.
Invariant: a READ becomes FAILED only after the peer's thread has closed the channel, so nothing is
written afterwards.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.clock import monotonic
from core.errors import TransferError
from kvtransfer.channel import Channel, Copies
from kvtransfer.pool_memory import check_distinct, check_ids, checked_pieces
from kvtransfer.transport import BlockPieces, BlockPool, Piece, ReadState

log = logging.getLogger(__name__)

MAX_QUEUED_READS = 1024
_JOIN_STEP_S = 0.01


class QueuedRead:
    """One READ. Queued and polled by the engine loop, ended there or by the peer's thread."""

    __slots__ = ("_peer", "copies", "duration_s", "error", "own_ids", "remote_ids", "state")

    def __init__(
        self, peer: "PeerReads", remote_ids: Sequence[int], own_ids: Sequence[int]
    ) -> None:
        """PENDING from here on."""
        self._peer = peer
        self.remote_ids = remote_ids
        self.own_ids = own_ids
        self.copies: Copies | None = None
        """While it goes on by itself."""
        self.state = ReadState.PENDING
        self.error = ""
        self.duration_s = 0.0

    def poll(self) -> ReadState:
        """Look, don't wait."""
        if self.copies is not None:
            self._peer.look_at(self)
        return self.state

    def finish(self, error: str) -> None:
        """End it, once; `error` empty means that all bytes are here."""
        copies, self.copies = self.copies, None
        if copies is not None:
            copies.free()
        if self.state is ReadState.PENDING:
            self.error = error
            self.state = ReadState.FAILED if error else ReadState.DONE


class PeerReads:
    """The READs from one peer and the thread that does them, or keeps the way open for them."""

    def __init__(self, peer_id: str, channel: Channel) -> None:
        """Start connecting."""
        self._peer_id = peer_id
        self._channel = channel
        self._queue: queue.Queue[QueuedRead | None] = queue.Queue(MAX_QUEUED_READS + 1)
        """Those that wait for the thread; None wakes it."""
        self._lock = threading.Lock()
        """Held while copies are started or looked at, so that the channel stays open meanwhile."""
        self._closed = False
        self._at_once = False
        """Set once the engine loop starts READs itself."""
        self._started: list[QueuedRead] = []
        """Those that it started and that were not seen to end."""
        self._broken = ""
        """What went wrong with copies that go on by themselves."""
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
        with self._lock:
            if len(self._started) + self._queue.qsize() >= MAX_QUEUED_READS:
                raise TransferError(
                    f"{MAX_QUEUED_READS} READs wait for peer {self._peer_id} already."
                )
            if self._at_once and not self._closed and not self._broken:
                self._begin(read)
            else:
                self._queue.put_nowait(read)
        if self._failure:
            self._fail_queued()

    def look_at(self, read: QueuedRead) -> None:
        """End a READ that goes on by itself if it has ended. Called by its `poll`."""
        with self._lock:
            if self._closed or self._broken or read.copies is None:
                return
            try:
                duration_s = read.copies.duration_s()
            except TransferError as error:
                self._break(error)
                return
            if duration_s is not None:
                read.duration_s = duration_s
                self._started.remove(read)
                read.finish("")

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
            if self._channel.open():
                self._leave_to_the_loop()
            while not (self._closing or self._broken) and (read := self._queue.get()) is not None:
                started_at = monotonic()
                self._channel.read(read.remote_ids, read.own_ids)
                read.duration_s = monotonic() - started_at
                read.finish("")
            failure = self._broken or failure
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
        for each in self._started:
            each.finish(self._failure)
        self._fail_queued()

    def _leave_to_the_loop(self) -> None:
        """Start what was queued meanwhile; whatever comes from now on is started where it comes."""
        with self._lock:
            self._at_once = True
            with contextlib.suppress(queue.Empty):
                while True:
                    read = self._queue.get_nowait()
                    if read is None or self._broken:
                        self._queue.put_nowait(read)
                        return
                    self._begin(read)

    def _begin(self, read: QueuedRead) -> None:
        self._started.append(read)
        try:
            read.copies = self._channel.read(read.remote_ids, read.own_ids)
        except TransferError as error:
            self._break(error)

    def _break(self, error: TransferError) -> None:
        """Have the thread close the channel and fail all READs, which may take a moment."""
        self._broken = error.message
        self._queue.put_nowait(None)

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
        remote_ids, own_ids = zip(*pairs, strict=True)
        check_ids(remote_ids, pool.num_blocks, "the peer's")
        check_ids(own_ids, self._num_blocks, "our")
        check_distinct(own_ids)
        read = QueuedRead(reads, remote_ids, own_ids)
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
