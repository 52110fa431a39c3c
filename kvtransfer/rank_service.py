"""Moves the blocks of a rank above 0, as rank 0 tells it, in a thread beside the rank's steps.

Made in each such rank's process; `ranked_transport.py` is the other half. Invariant: every READ
that was asked for is reported as ended exactly once, and a peer as let go after its READs.
"""

import logging
import threading
from contextlib import suppress
from typing import Protocol

from core.errors import DiptychError, TransferError
from kvtransfer.cuda_driver import use_gpu
from kvtransfer.rank_transport import RankTransport
from kvtransfer.select import known_transport, open_transport
from kvtransfer.stamps import PoolStamps
from kvtransfer.transport import BlockPool, Read, ReadState
from kvtransfer.wire import layout_from_proto
from rpc.v1 import kv_ranks_pb2 as pb

log = logging.getLogger(__name__)

_POLL_S = 0.0005
"""Between two looks at READs under way."""
_JOIN_S = 10.0


class Channel(Protocol):
    """The way to rank 0. One thread receives, any may send."""

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The next message, waited for that long or for ever; None: none came."""
        ...

    def interrupt(self) -> None:
        """Let `receive` return None now. From another thread."""
        ...

    def send(self, message: bytes) -> None:
        """To rank 0."""
        ...

    def fail(self, error: Exception) -> None:
        """End the engine: this rank can't go on."""
        ...


class RankService:
    """A rank's transport and the thread that serves rank 0 with it."""

    def __init__(
        self, rank: int, pool: BlockPool, channel: Channel, *, host: str | None = None
    ) -> None:
        """Wait for rank 0's word; the transport is opened then.

        Args:
            rank: which one this is.
            pool: of this rank.
            channel: to rank 0.
            host: name or address of this host, where it isn't rank 0's.
        """
        self._rank = rank
        self._host = host
        self._pool = pool
        self._channel = channel
        self._transport: RankTransport | None = None
        self._reads: dict[int, Read] = {}
        self._refused: dict[str, str] = {}
        """Peers that could not be connected to, and why."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-rank", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drop all peers; on return nothing is written into the pool any more."""
        self._closing = True
        self._channel.interrupt()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            log.warning("the KV transport of rank %d does not close", self._rank)

    def _run(self) -> None:
        try:
            while not self._closing:
                message = self._channel.receive(_POLL_S if self._reads else None)
                if message is not None:
                    self._obey(pb.RankCommand.FromString(message))
                self._report_ended()
            self._shut()
        except Exception as error:
            log.exception("rank %d can't move KV any more", self._rank)
            with suppress(Exception):
                self._channel.fail(error)

    def _obey(self, command: pb.RankCommand) -> None:
        match command.WhichOneof("body"):
            case "open":
                opened = self._open(command.open)
                self._report(pb.RankReport(opened=opened))
            case "connect":
                self._connect(command.connect)
            case "read":
                self._read(command.read)
            case "disconnect":
                self._disconnect(command.disconnect)
            case "stamp":
                self._stamp(command.stamp)
            case "shut":
                self._shut()
                self._report(pb.RankReport(shut=pb.RankShutDone()))

    def _open(self, opening: pb.RankOpen) -> pb.RankOpened:
        try:
            if self._pool.device_id is not None:
                use_gpu(self._pool.device_id)
            transport = open_transport(
                known_transport(opening.transport),
                self._pool,
                host=self._host or opening.host,
                token=opening.token,
                descriptor_bytes=(
                    opening.descriptor_bytes if opening.HasField("descriptor_bytes") else None
                ),
            )
        except DiptychError as error:
            return pb.RankOpened(error=error.message)
        layout = layout_from_proto(opening.layout)
        ranks = {"rank": self._rank, "size": opening.size}
        stamps = PoolStamps(self._pool, layout, **ranks)
        self._transport = RankTransport(transport, layout, stamps, **ranks)
        return pb.RankOpened(metadata=transport.metadata())

    def _connect(self, connect: pb.RankConnect) -> None:
        try:
            layout = layout_from_proto(connect.layout)
            self._opened.connect(connect.peer_id, layout, connect.rank_metadata)
        except TransferError as error:
            self._refused[connect.peer_id] = error.message

    def _read(self, read: pb.RankRead) -> None:
        try:
            refused = self._refused.get(read.peer_id)
            if refused is not None:
                raise TransferError(refused)
            pairs = list(zip(read.remote_ids, read.own_ids, strict=True))
            self._reads[read.number] = self._opened.read(read.peer_id, pairs)
        except TransferError as error:
            self._report_read(read.number, error.message, 0.0)

    def _stamp(self, stamp: pb.RankStamp) -> None:
        stamped = pb.RankStamped(number=stamp.number)
        try:
            if not stamp.look:
                self._opened.stamp(stamp.block_id, stamp.name)
            stamped.holds = not stamp.look or self._opened.bears(stamp.block_id, stamp.name)
        except TransferError as error:
            stamped.error = error.message
        self._report(pb.RankReport(stamped=stamped))

    def _disconnect(self, disconnect: pb.RankDisconnect) -> None:
        self._opened.disconnect(disconnect.peer_id)
        self._refused.pop(disconnect.peer_id, None)
        self._report_ended()
        disconnected = pb.RankDisconnected(number=disconnect.number)
        self._report(pb.RankReport(disconnected=disconnected))

    def _shut(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._report_ended()

    @property
    def _opened(self) -> RankTransport:
        assert self._transport is not None, "rank 0 opens the transport first"
        return self._transport

    def _report_ended(self) -> None:
        for number, read in list(self._reads.items()):
            if read.poll() is not ReadState.PENDING:
                del self._reads[number]
                self._report_read(number, read.error, read.duration_s)

    def _report_read(self, number: int, error: str, duration_s: float) -> None:
        ended = pb.RankReadEnded(number=number, error=error, duration_s=duration_s)
        self._report(pb.RankReport(read_ended=ended))

    def _report(self, report: pb.RankReport) -> None:
        self._channel.send(report.SerializeToString())
