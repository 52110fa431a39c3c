"""Prefill's part of the engine loop: leases the KV of finished prompts to decode workers.

Thin glue. The rules are in `kvtransfer.export`; here its events come from the engine and from
links, and its actions are carried out on them. Invariant: every block reported to the machine
carries one hold taken here, and FreeBlocks gives that hold back.
"""

import logging
from dataclasses import dataclass

from core.clock import Clock, monotonic
from core.errors import DiptychError, ErrorCode, InvalidRequestError, TransferError
from core.finish import FinishReason
from engine.engine import Engine
from engine.request import SequenceOutput, StepOutputs
from kvtransfer import wire
from kvtransfer.actions import (
    CancelPrefill,
    CloseLink,
    ExportAction,
    FreeBlocks,
    ReserveScratch,
    Send,
)
from kvtransfer.export import ExportMachine
from kvtransfer.messages import Hello, Key
from kvtransfer.worker_transport import WorkerTransport
from prefill.metrics import ExportMetrics
from prefill.settings import PrefillSettings
from rpc.v1 import ipc_pb2, worker_pb2
from worker.hello import own_hello, own_transport
from worker.role import BuildRole, Outbox, Role, RoleContext, Submission, engine_id
from worker.scratch import scratch_request

log = logging.getLogger(__name__)

_TURN_S = 0.1
"""Leases are looked at this often when nothing else wakes the loop."""


@dataclass(slots=True)
class _Prompt:
    """A prompt under computation."""

    submission: Submission
    reported_blocks: int = 0


class Exporter:
    """Implements `worker.role.Role` for prefill."""

    role = worker_pb2.ROLE_PREFILL

    def __init__(
        self,
        *,
        engine: Engine,
        outbox: Outbox,
        hello: Hello,
        transport: WorkerTransport,
        metrics: ExportMetrics,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._clock = clock
        self._transport = transport
        self._metrics = metrics
        self._machine = ExportMachine(hello)
        self._block_size = hello.layout.block_size
        self._prompts: dict[str, _Prompt] = {}
        self._links: set[int] = set()

    @property
    def transports(self) -> list[str]:
        """The one in use."""
        return [self._transport.name]

    @property
    def leases(self) -> int:
        """Prompts whose blocks belong to a lease, or will."""
        return self._machine.num_leases

    def submit(self, submission: Submission) -> None:
        """Compute a prompt for a decode worker.

        Raises:
            InvalidRequestError: the phase is not `export`.
            DiptychError: the engine can't take it.
        """
        if submission.submit.WhichOneof("phase") != "export":
            raise InvalidRequestError(
                "A prefill worker fetches no KV; submit with phase export or local.", param="phase"
            )
        now = self._clock()
        key, request = submission.key, submission.request
        try:
            self._engine.add(request)
        except DiptychError as error:
            self._do(self._machine.failed(key, error.code, error.message, now))
            raise
        self._prompts[request.request_id] = _Prompt(submission)
        num_tokens = len(request.prompt_ids) + len(request.output_ids)
        decode_worker_id = submission.submit.export.decode_worker_id
        self._do(
            self._machine.submitted(
                key, decode_worker_id, num_tokens, now, router=submission.channel
            )
        )

    def abort(self, submission: Submission) -> None:
        """Nobody wants the prompt any more; a lease that decode may be reading lives on."""
        self._prompts.pop(submission.request.request_id, None)
        message = "The router took the request back."
        self._do(
            self._machine.failed(submission.key, ErrorCode.KV_TRANSFER, message, self._clock())
        )

    def withdraw(self, key: Key, channel: int) -> None:
        """A prompt that is complete has lost the part of decode; unclaimed, it is freed."""
        self._do(self._machine.withdrawn(key, channel))

    def receive(self, command: ipc_pb2.EngineCommand) -> None:
        """A decode worker's message, or the end of its link or of a router's stream."""
        if command.HasField("closed"):
            self._do(self._machine.router_left(command.closed.channel))
            self._links.discard(command.closed.channel)
            self._do(self._machine.link_closed(command.closed.channel, self._clock()))
            return
        link = command.decode.channel
        if link not in self._links:
            self._links.add(link)
            self._do(self._machine.link_opened(link))
        try:
            message = wire.decode_from_proto(command.decode.message)
        except DiptychError as error:
            self._links.discard(link)
            self._do(self._machine.link_closed(link, self._clock()))
            self._do([CloseLink(link, error.message)])
            return
        self._do(self._machine.received(link, message, self._clock()))

    def after_step(self, outputs: StepOutputs) -> None:
        """Report finished blocks while their sequences still hold them."""
        now = self._clock()
        for output in outputs.outputs:
            prompt = self._prompts.get(output.request_id)
            if prompt is not None:
                self._advance(prompt, output, now)

    def _advance(self, prompt: _Prompt, output: SequenceOutput, now: float) -> None:
        key = prompt.submission.key
        ended = output.finish_reason
        if ended in (None, FinishReason.HANDED_OVER):
            self._report_blocks(prompt, output, now)
        if ended is None:
            return
        del self._prompts[output.request_id]
        if ended is FinishReason.HANDED_OVER:
            logprobs = output.logprobs[0] if output.logprobs else None
            cached = output.num_cached_tokens
            token = output.token_ids[0]
            self._metrics.committed()
            self._do(self._machine.committed(key, token, logprobs, cached, now))
            return
        if output.error is None:
            self._do(self._machine.enough(key, now))
        else:
            self._do(self._machine.failed(key, output.error.code, output.error.message, now))

    def _report_blocks(self, prompt: _Prompt, output: SequenceOutput, now: float) -> None:
        complete = output.num_computed // self._block_size
        if output.finish_reason is FinishReason.HANDED_OVER:
            complete = -(-output.num_computed // self._block_size)
        if complete <= prompt.reported_blocks:
            return
        blocks = list(
            self._engine.block_table(output.request_id)[prompt.reported_blocks : complete]
        )
        prompt.reported_blocks = complete
        self._engine.hold(blocks)
        self._do(self._machine.progressed(prompt.submission.key, blocks, now))

    def turn(self, now: float) -> None:
        """Let leases run out."""
        self._transport.check()
        self._do(self._machine.expire(now))

    def wait_s(self, now: float) -> float:
        """Often enough for leases to run out on time."""
        return _TURN_S

    def report(self, load: worker_pb2.LoadReport) -> None:
        """Links are measured by decode."""

    def observe(self) -> None:
        """Leases as of now."""
        machine = self._machine
        self._metrics.observe(machine.num_leases, machine.num_held_blocks, machine.counters)

    def close(self) -> None:
        """Serve no more READs."""
        self._transport.close()

    def _do(self, actions: list[ExportAction]) -> None:
        for action in actions:
            match action:
                case Send(link, message):
                    frame = ipc_pb2.PrefillFrame(
                        channel=link, message=wire.prefill_to_proto(message)
                    )
                    self._outbox.send(ipc_pb2.EngineEvent(prefill=frame))
                case CloseLink(link, reason):
                    close = ipc_pb2.CloseChannel(channel=link, reason=reason)
                    self._outbox.send(ipc_pb2.EngineEvent(close=close))
                case FreeBlocks(_, block_ids):
                    self._engine.release(block_ids)
                case ReserveScratch(key, num_blocks):
                    self._reserve_scratch(key, num_blocks)
                case CancelPrefill(key, code, text):
                    self._prompts.pop(engine_id(key), None)
                    self._engine.abort(engine_id(key))
                    self._outbox.fail(key, DiptychError(text, code=code))

    def _reserve_scratch(self, key: Key, num_blocks: int) -> None:
        """Put free blocks under a probe's lease; the lease's hold is all that keeps them."""
        now = self._clock()
        try:
            request = scratch_request(engine_id(key), num_blocks, self._block_size)
            reservation = self._engine.reserve(request)
        except DiptychError as error:
            self._do(self._machine.failed(key, error.code, error.message, now))
            return
        if reservation is None:
            message = "No blocks are free on the prefill worker."
            self._do(self._machine.failed(key, ErrorCode.OVERLOADED, message, now))
            return
        blocks = list(reservation.block_table)
        self._engine.hold(blocks)
        self._engine.cancel(reservation)
        try:
            self._transport.stamp(blocks[0], key.request_id)
        except TransferError as error:
            self._engine.release(blocks)
            log.warning("can't stamp a block, so a link goes untested: %s", error)
            self._do(self._machine.failed(key, ErrorCode.OVERLOADED, error.message, now))
            return
        self._do(self._machine.progressed(key, blocks, now))
        self._do(self._machine.committed(key, 0, None, 0, now))


def build_exporter(settings: PrefillSettings) -> BuildRole:
    """How a prefill worker's engine process makes its role."""

    def build(context: RoleContext) -> Role:
        transport = own_transport(settings, context)
        hello = own_hello(context.description, transport, lease_ttl_s=settings.lease_ttl_s)
        return Exporter(
            engine=context.engine,
            outbox=context.outbox,
            hello=hello,
            transport=transport,
            metrics=ExportMetrics(context.registry),
            clock=monotonic,
        )

    return build
