"""Decode's part of the engine loop: fetches the KV of prompts that prefill workers computed.

Thin glue. The rules are in `kvtransfer.handover`; here its events come from routers, links, the
transport and the engine, and its actions are carried out on them.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from core.clock import Clock, monotonic
from core.errors import DiptychError, ErrorCode, InvalidRequestError, TransferError
from decode.link_rates import LinkRates
from decode.metrics import ImportMetrics
from decode.settings import DecodeSettings
from engine.engine import Engine
from engine.request import Reservation, StepOutputs
from kvtransfer import actions as act
from kvtransfer import wire
from kvtransfer.handover import HandoverMachine
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.messages import Hello, Key
from kvtransfer.transport import Read, ReadState
from kvtransfer.worker_transport import WorkerTransport
from rpc.v1 import ipc_pb2, worker_pb2
from worker.hello import own_hello, own_transport
from worker.role import BuildRole, Outbox, Role, RoleContext, Submission, engine_id
from worker.scratch import scratch_request
from worker.switchboard import FIRST_ENGINE_CHANNEL

log = logging.getLogger(__name__)

PROBE_SHARE = 32
"""A probe takes at most this share of the own pool, one block out of so many."""
WRONG_BYTES = "a test block arrived with other bytes than were sent"
_READING_S = 0.0002
"""Sleep between two looks at READs under way."""
_WAITING_S = 0.01
"""Sleep while prompts wait for room."""
_IDLE_S = 0.1
"""Sleep with nothing to do but keep leases alive."""


@dataclass(frozen=True, slots=True)
class _PendingRead:
    key: Key
    number: int
    peer_id: str
    own_blocks: tuple[int, ...]
    stamped: bool
    read: Read


class Importer:
    """Implements `worker.role.Role` for decode."""

    role = worker_pb2.ROLE_DECODE

    def __init__(
        self,
        *,
        engine: Engine,
        outbox: Outbox,
        hello: Hello,
        config: HandoverConfig,
        transport: WorkerTransport,
        metrics: ImportMetrics,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._clock = clock
        self._transport = transport
        self._metrics = metrics
        self._machine = HandoverMachine(hello, config)
        self._block_bytes = hello.layout.block_bytes
        self._block_size = hello.layout.block_size
        self._rates = LinkRates(self._block_bytes, metrics, could_use_nixl=hello.could_use_nixl)
        self._reads: list[_PendingRead] = []
        self._unreserved: dict[Key, Submission] = {}
        self._reservations: dict[Key, Reservation] = {}

    @property
    def transports(self) -> list[str]:
        """The one in use."""
        return [self._transport.name]

    @property
    def leases(self) -> int:
        """Hand-overs under way."""
        return self._machine.num_handovers

    def submit(self, submission: Submission) -> None:
        """Fetch a prompt's KV and go on from there.

        Raises:
            InvalidRequestError: the phase is not `import`, or the request never fits this worker.
        """
        if submission.submit.WhichOneof("phase") != "import":
            raise InvalidRequestError(
                "A decode worker leases no KV out; submit with phase import or local.",
                param="phase",
            )
        self._engine.check(submission.request)
        # `import` is a word of Python, so the field can't be named as an attribute.
        source: worker_pb2.Import = getattr(submission.submit, "import")
        request = submission.request
        self._do(
            self._machine.submitted(
                submission.key,
                worker_id=source.prefill_worker_id,
                epoch=source.prefill_epoch,
                address=source.kv_address,
                num_tokens=len(request.prompt_ids) + len(request.output_ids),
                deadline=submission.deadline,
                now=self._clock(),
            )
        )

    def abort(self, submission: Submission) -> None:
        """Give the hand-over up; blocks return when no READ is pending into them."""
        self._do(self._machine.aborted(submission.key, self._clock()))

    def withdraw(self, key: Key, channel: int) -> None:
        """Here a submission lives as long as its hand-over."""

    def receive(self, command: ipc_pb2.EngineCommand) -> None:
        """A prefill worker's message, or the end of its link."""
        now = self._clock()
        if command.HasField("closed"):
            link = command.closed.channel - FIRST_ENGINE_CHANNEL
            self._do(self._machine.link_closed(link, command.closed.reason, now))
            return
        link = command.prefill.channel - FIRST_ENGINE_CHANNEL
        try:
            message = wire.prefill_from_proto(command.prefill.message)
        except DiptychError as error:
            self._do(self._machine.peer_failed(link, error.message, now))
            return
        self._do(self._machine.received(link, message, now))
        if isinstance(message, Hello):
            self._rates.met(message.worker_id, message.could_use_nixl)

    def after_step(self, outputs: StepOutputs) -> None:
        """Steps concern only what was delivered already."""

    def turn(self, now: float) -> None:
        """Take in READs that ended, find room for prompts, let time pass."""
        self._transport.check()
        self._poll_reads()
        self._reserve_waiting(now)
        self._do(self._machine.tick(self._clock()))

    def wait_s(self, now: float) -> float:
        """Short while KV is on its way."""
        if self._reads:
            return _READING_S
        return _WAITING_S if self._unreserved else _IDLE_S

    def observe(self) -> None:
        """Hand-overs as of now."""
        machine = self._machine
        self._metrics.observe(machine.num_handovers, len(self._unreserved), machine.counters)

    def report(self, load: worker_pb2.LoadReport) -> None:
        """How fast the links are, and what they are made of; what room is promised."""
        load.awaited_blocks = self._machine.num_awaited_blocks
        load.links.extend(self._rates.report())
        load.transport = self._metrics.transport

    def close(self) -> None:
        """Drop all peers."""
        self._transport.close()

    def _poll_reads(self) -> None:
        polled = [(pending, pending.read.poll()) for pending in self._reads]
        ended = [(pending, state) for pending, state in polled if state is not ReadState.PENDING]
        # NOTE: read after the polls. Were this process frozen in between, an older time would judge
        # leases by a moment at which they still held, and what was read since may be overwritten.
        now = self._clock()
        for pending, state in ended:
            if pending not in self._reads:
                continue  # An earlier one's failure dropped the peer, and this READ with it.
            self._reads.remove(pending)
            if state is ReadState.DONE:
                self._read_done(pending, now)
            else:
                self._do(
                    self._machine.read_failed(pending.key, pending.number, pending.read.error, now)
                )

    def _read_done(self, pending: _PendingRead, now: float) -> None:
        duration_s = pending.read.duration_s
        self._rates.read(pending.peer_id, len(pending.own_blocks), duration_s)
        key, number = pending.key, pending.number
        if pending.stamped and not self._bears_stamp(pending):
            self._do(self._machine.read_failed(key, number, WRONG_BYTES, now))
        else:
            self._do(self._machine.read_done(key, number, now, duration_s))

    def _bears_stamp(self, pending: _PendingRead) -> bool:
        try:
            return self._transport.bears(pending.own_blocks[0], pending.key.request_id)
        except TransferError as error:
            # The own pool can't be looked into: that says nothing about the link.
            log.warning("can't tell whether a test block came as it was sent: %s", error)
            return True

    def _reserve_waiting(self, now: float) -> None:
        """Give blocks to waiting prompts in order of arrival; a large one is not overtaken."""
        for key, submission in list(self._unreserved.items()):
            if key not in self._unreserved:
                continue
            try:
                reservation = self._engine.reserve(submission.request)
            except DiptychError as error:
                self._do(self._machine.failed(key, error.code, error.message, now))
                continue
            if reservation is None:
                return
            del self._unreserved[key]
            self._reservations[key] = reservation
            table = tuple(reservation.block_table)
            cached = reservation.num_cached_blocks
            self._do(self._machine.reserved(key, table, cached, now))

    def _do(self, actions: Sequence[act.HandoverAction]) -> None:
        todo = deque(actions)
        while todo:
            todo.extend(self._do_one(todo.popleft()))

    def _do_one(self, action: act.HandoverAction) -> Sequence[act.HandoverAction]:
        """Carry out one action; returns what follows from it."""
        match action:
            case act.Send(link, message):
                frame = ipc_pb2.DecodeFrame(
                    channel=FIRST_ENGINE_CHANNEL + link,
                    message=wire.decode_to_proto(message),
                )
                self._outbox.send(ipc_pb2.EngineEvent(decode=frame))
            case act.OpenLink(link, address):
                request = ipc_pb2.OpenLink(channel=FIRST_ENGINE_CHANNEL + link, address=address)
                self._outbox.send(ipc_pb2.EngineEvent(open=request))
            case act.CloseLink(link, reason):
                log.info("closing link %d: %s", link, reason)
                close = ipc_pb2.CloseChannel(channel=FIRST_ENGINE_CHANNEL + link, reason=reason)
                self._outbox.send(ipc_pb2.EngineEvent(close=close))
            case act.ConnectPeer():
                return self._connect(action)
            case act.DisconnectPeer(peer_id):
                self._transport.disconnect(peer_id)
                self._rates.closed(peer_id)
                self._reads = [read for read in self._reads if read.peer_id != peer_id]
            case act.Reserve(key):
                submission = self._outbox.find(key)
                assert submission is not None, "a hand-over outlives its submission only when ended"
                self._unreserved[key] = submission
            case act.DropBlocks(key):
                self._unreserved.pop(key, None)
                reservation = self._reservations.pop(key, None)
                if reservation is not None:
                    self._engine.cancel(reservation)
            case act.ReserveScratch(key, num_blocks):
                return self._reserve_scratch(key, num_blocks)
            case act.ProbeEnded(key, outcome, text):
                log.debug("%s: %s %s", key.request_id, outcome, text)
                self._metrics.probe_ended(outcome)
            case act.LinkTested(worker_id, epoch, failure):
                self._rates.tested(worker_id, epoch, failure)
            case act.StartRead():
                return self._start_read(action)
            case act.Deliver():
                self._deliver(action)
            case act.Fail(key, code, text):
                self._metrics.failed(code)
                # To a router a lost worker is the one that says so, which then would be avoided.
                told = ErrorCode.KV_TRANSFER if code is ErrorCode.WORKER_LOST else code
                self._outbox.fail(key, DiptychError(text, code=told))
        return ()

    def _connect(self, connect: act.ConnectPeer) -> Sequence[act.HandoverAction]:
        try:
            hello = connect.hello
            self._transport.connect(connect.peer_id, hello.layout, hello.rank_metadata)
        except TransferError as error:
            log.warning("can't connect to %s: %s", connect.peer_id, error)
            return self._machine.peer_failed(connect.link, error.message, self._clock())
        self._rates.opened(connect.peer_id, connect.hello.worker_id)
        return ()

    def _reserve_scratch(self, key: Key, num_blocks: int) -> Sequence[act.HandoverAction]:
        now = self._clock()
        try:
            request = scratch_request(engine_id(key), num_blocks, self._block_size)
            reservation = self._engine.reserve(request)
        except DiptychError as error:
            return self._machine.failed(key, error.code, error.message, now)
        if reservation is None:
            message = "No blocks are free here."
            return self._machine.failed(key, ErrorCode.OVERLOADED, message, now)
        self._reservations[key] = reservation
        return self._machine.reserved(key, tuple(reservation.block_table), 0, now)

    def _start_read(self, start: act.StartRead) -> Sequence[act.HandoverAction]:
        try:
            read = self._transport.read(start.peer_id, start.pairs)
        except TransferError as error:
            now = self._clock()
            return self._machine.read_failed(start.key, start.read_no, error.message, now)
        own_blocks = tuple(own for _, own in start.pairs)
        self._reads.append(
            _PendingRead(start.key, start.read_no, start.peer_id, own_blocks, start.stamped, read)
        )
        return ()

    def _deliver(self, deliver: act.Deliver) -> None:
        submission = self._outbox.find(deliver.key)
        reservation = self._reservations.pop(deliver.key)
        assert submission is not None, "an aborted hand-over is never delivered"
        submission.received_at = self._clock()
        submission.times.transfer_s = deliver.transfer_s
        submission.cached_tokens = deliver.prefill_cached_tokens
        submission.kv_bytes = deliver.num_read_blocks * self._block_bytes
        self._metrics.delivered(deliver.transfer_s, submission.kv_bytes)
        self._outbox.emit_token(submission, deliver.first_token, deliver.logprobs)
        ended = self._engine.adopt(reservation, deliver.first_token, deliver.logprobs)
        if ended.finish_reason is not None:
            self._outbox.finish(submission, ended.finish_reason, matched_stop=ended.matched_stop)


def handover_config(settings: DecodeSettings, hello: Hello) -> HandoverConfig:
    """Bounds in blocks that follow from settings in bytes; a block counts with all ranks' heads."""
    block_bytes = hello.layout.block_bytes
    return HandoverConfig(
        peer_silence_s=settings.peer_silence_s,
        max_inflight_blocks=max(1, settings.max_inflight_bytes // block_bytes),
        test_links=hello.num_blocks >= PROBE_SHARE,
        probe_blocks=min(settings.probe_bytes // block_bytes, hello.num_blocks // PROBE_SHARE),
        probe_interval_s=settings.probe_interval_s,
    )


def build_importer(settings: DecodeSettings) -> BuildRole:
    """How a decode worker's engine process makes its role."""

    def build(context: RoleContext) -> Role:
        transport = own_transport(settings, context)
        hello = own_hello(context.description, transport)
        return Importer(
            engine=context.engine,
            outbox=context.outbox,
            hello=hello,
            config=handover_config(settings, hello),
            transport=transport,
            metrics=ImportMetrics(context.registry, transport.name),
            clock=monotonic,
        )

    return build
