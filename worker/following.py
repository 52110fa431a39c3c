"""A node that does not lead: joins the leader, runs its ranks, ends when the leader or one ends.

It has the ports of a worker for those who probe it, and nothing to tell routers or peers. Its exit
status says who is to blame: EXIT_FAILED this node, EXIT_REFUSED its settings, EXIT_NODE_LOST
another node.
"""

import asyncio
import logging
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import CollectorRegistry

from core.clock import monotonic
from core.errors import ConfigError
from engine.parallel.meeting import Meeting
from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.server import RpcServer, build_server
from rpc.v1 import nodes_pb2, nodes_pb2_grpc
from worker.agreement import agreed
from worker.exit_status import EXIT_FAILED, EXIT_NODE_LOST, EXIT_REFUSED
from worker.leading import BEATS_PER_SILENCE
from worker.node_metrics import show_silence
from worker.node_ranks import FollowerRanks
from worker.process_metrics import open_metrics_port
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_SERVER_GRACE_S = 1.0
_RETRY_S = 0.5
_REMIND_S = 15.0
_ANSWER_S = 60.0
"""The leader may have to read its model's files first."""
_OUTGOING = 4096
"""Frames that wait to be sent; ranks wait when there are as many."""
_LAST_WORD_S = 5.0
_DRAIN_MARGIN_S = 15.0
"""Beyond what running requests get, for the leader to end."""
_REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)

if TYPE_CHECKING:  # gRPC's classes take type arguments in its stubs only
    Call = grpc.aio.StreamStreamCall[nodes_pb2.NodeMessage, nodes_pb2.LeaderMessage]


class NodeEndedError(Exception):
    """This node can't go on; `status` is the process's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class NodeView:
    """What probes and metrics see."""

    heard_at: float | None = None
    """When the leader last gave a sign of life."""
    ranks: FollowerRanks | None = None

    @property
    def ready(self) -> bool:
        """True while every rank of this node takes steps."""
        return self.ranks is not None and self.ranks.ready.is_set()

    @property
    def silence_s(self) -> float:
        """Since the leader was last heard."""
        return monotonic() - self.heard_at if self.heard_at is not None else 0.0

    def registry(self) -> CollectorRegistry:
        """Metrics of this process."""
        registry = CollectorRegistry()
        show_silence(registry, {0: lambda: self.silence_s})
        return registry


async def serve_follower(
    settings: WorkerSettings,
    role: str,
    credentials: Credentials,
    signals: "asyncio.Queue[int]",
) -> int:
    """Take part in the worker of another node until it ends; returns the process's exit status.

    The first signal lets the leader finish what runs, a second one ends at once.
    """
    server = build_server(credentials, services=[])
    port = server.bind(settings.host, settings.port, insecure=settings.insecure)
    view = NodeView()
    async with AsyncExitStack() as stack:
        await server.start()
        stack.push_async_callback(server.stop, _SERVER_GRACE_S)
        metrics = await open_metrics_port(
            view.registry(),
            settings,
            labels={"role": role, "worker": settings.worker_id or f"{role}-{settings.host}:{port}"},
            ready=lambda: view.ready,
        )
        stack.callback(metrics.close)
        metrics_port = metrics.sockets[0].getsockname()[1]
        log.info("listening on %s:%d, metrics on port %d", settings.host, port, metrics_port)
        follower = _Follower(settings, view, server)
        work = asyncio.create_task(follower.run(role, credentials))
        stop = asyncio.create_task(_await_stop(follower, signals, settings.drain_timeout_s))
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except NodeEndedError as error:
            log.error("%s", error)
            return error.status
        except ConfigError as error:
            log.error("%s", error)
            return EXIT_REFUSED
        finally:
            await _cancel(work, stop)
    return 0


async def _await_stop(
    follower: "_Follower", signals: "asyncio.Queue[int]", drain_timeout_s: float
) -> None:
    await signals.get()
    if await follower.ask_to_stop():
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s + _DRAIN_MARGIN_S):
                await signals.get()


class _Follower:
    def __init__(self, settings: WorkerSettings, view: NodeView, server: RpcServer) -> None:
        self._settings = settings
        self._view = view
        self._server = server
        self._outgoing: asyncio.Queue[nodes_pb2.NodeMessage] = asyncio.Queue(_OUTGOING)
        self._silence_s = settings.node_timeout_s
        self._leader = f"The leader at {settings.leader_address}"

    async def ask_to_stop(self) -> bool:
        """Ask the leader to finish what runs; False if nothing can be running."""
        if not self._view.ready:
            return False
        log.info("asking the leader to finish what runs")
        await self._outgoing.put(nodes_pb2.NodeMessage(stopping=nodes_pb2.NodeStopping()))
        return True

    async def run(self, role: str, credentials: Credentials) -> None:
        """Join and take part until rank 0 ends.

        Raises:
            NodeEndedError: something else ended it.
            ConfigError: the model can't be found.
        """
        address = self._settings.leader_address
        assert address is not None, "settings see to it"
        log.info("reading the model's digest")
        terms = await asyncio.to_thread(agreed, self._settings, role)
        hello = nodes_pb2.NodeHello(
            node_rank=self._settings.node_rank, host=self._settings.own_host, agreed=terms
        )
        async with open_channel(address, credentials) as channel:
            call, leader = await self._join(nodes_pb2_grpc.NodesStub(channel), hello)
            log.info("joined the leader at %s", address)
            try:
                await self._take_part(call, leader)
            finally:
                call.cancel()

    async def _join(
        self, stub: nodes_pb2_grpc.NodesStub, hello: nodes_pb2.NodeHello
    ) -> "tuple[Call, nodes_pb2.LeaderHello]":
        give_up_at = monotonic() + self._settings.start_timeout_s
        remind_at = 0.0
        while True:
            call: Call = stub.Join()
            try:
                async with asyncio.timeout(min(_ANSWER_S, self._settings.start_timeout_s)):
                    await call.write(nodes_pb2.NodeMessage(hello=hello))
                    message = await call.read()
                if isinstance(message, nodes_pb2.LeaderMessage):
                    return call, message.hello
                code, why = await call.code(), await call.details()
            except (grpc.RpcError, asyncio.InvalidStateError):
                code, why = await call.code(), await call.details()
            except TimeoutError:
                call.cancel()
                code, why = grpc.StatusCode.DEADLINE_EXCEEDED, "it does not answer"
            if code in _REFUSALS:
                raise NodeEndedError(
                    f"{self._leader} does not take node {hello.node_rank}: {why}", EXIT_REFUSED
                )
            now = monotonic()
            if now > give_up_at:
                raise NodeEndedError(
                    f"{self._leader} was not there within {self._settings.start_timeout_s:.0f} s: "
                    f"{why}",
                    EXIT_NODE_LOST,
                )
            if now >= remind_at:
                remind_at = now + _REMIND_S
                log.info("waiting for the leader at %s: %s", self._settings.leader_address, why)
            await asyncio.sleep(_RETRY_S)

    async def _take_part(self, call: "Call", leader: nodes_pb2.LeaderHello) -> None:
        self._silence_s = leader.silence_ms / 1000
        self._view.heard_at = monotonic()
        assert self._settings.leader_address is not None
        meeting = Meeting(
            own_host=self._settings.own_host,
            leader_host=self._settings.leader_address.rpartition(":")[0].strip("[]"),
            port=leader.rendezvous_port,
            name=leader.rendezvous_name,
        )
        ranks = await FollowerRanks.start(self._settings, meeting, self._take)
        self._view.ranks = ranks
        tell = asyncio.create_task(self._tell(call))
        hear = asyncio.create_task(self._hear(call, ranks))
        run = asyncio.create_task(ranks.run())
        probes = asyncio.create_task(self._tell_probes(ranks))
        try:
            await asyncio.wait({tell, hear, run}, return_when=asyncio.FIRST_COMPLETED)
            reason = run.result() if run.done() else ""
            if run.done():
                end = nodes_pb2.NodeEnd(reason=reason)
                await self._outgoing.put(nodes_pb2.NodeMessage(end=end))
                await asyncio.wait({tell}, timeout=_LAST_WORD_S)
            # When a node is lost, ranks of all nodes fail; the leader says which was the first.
            await asyncio.wait({hear}, timeout=_LAST_WORD_S)
            if run.done() and not reason:
                log.info("rank 0 has ended, and this node with it")
                return
            gone = hear.result() if hear.done() else ""
            if gone or not reason:
                why = gone or "it does not listen any more"
                raise NodeEndedError(f"{self._leader} is gone: {why}", EXIT_NODE_LOST)
            raise NodeEndedError(f"This node fails: {reason}; see above.", EXIT_FAILED)
        finally:
            self._view.ranks = None
            await _cancel(tell, hear, run, probes)
            await ranks.kill()

    async def _tell_probes(self, ranks: FollowerRanks) -> None:
        await ranks.ready.wait()
        await self._server.set_serving(True)
        node, nodes = self._settings.node_rank, self._settings.nodes
        log.info("node %d of %d is ready", node, nodes, extra={"stage": "ready"})

    async def _take(self, frame: bytes) -> None:
        await self._outgoing.put(nodes_pb2.NodeMessage(frames=frame))

    async def _tell(self, call: "Call") -> None:
        while True:
            message = nodes_pb2.NodeMessage()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._silence_s / BEATS_PER_SILENCE):
                    message = await self._outgoing.get()
            try:
                await call.write(message)
            except (grpc.RpcError, asyncio.InvalidStateError):
                return
            if message.HasField("end"):
                await call.done_writing()
                return

    async def _hear(self, call: "Call", ranks: FollowerRanks) -> str:
        """Hand on the leader's frames; why there are no more, empty if it let this node go."""
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await call.read()
            except TimeoutError:
                return f"no sign of life for {self._silence_s:.1f} s"
            except grpc.RpcError:
                return f"the connection broke ({await call.details()})"
            if not isinstance(message, nodes_pb2.LeaderMessage):
                return await call.details() or ""
            self._view.heard_at = monotonic()
            match message.WhichOneof("body"):
                case "frames":
                    try:
                        await ranks.send(message.frames)
                    except OSError as error:
                        log.warning("a rank does not take frames: %s", error)
                case "end":
                    return message.end.reason


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
