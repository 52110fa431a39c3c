"""The leader's side of a worker that spans nodes: lets them join, carries their ranks' frames.

Lives in the service process of node 0. To the engine a node is a socket that holds its ranks'
frames (engine/parallel/pipe.py); here that socket is joined to the node's stream. Invariant: once a
node is lost the engine has been told why, in one frame, and its socket is closed; a node is never
taken back, since ranks that are out of step can't be brought back into it.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import CollectorRegistry

from core.clock import Clock
from core.errors import DiptychError
from engine.parallel.pipe import Frame, frame
from rpc.v1 import nodes_pb2, nodes_pb2_grpc
from worker.agreement import agreed, differences
from worker.engine_child import EngineFailedError
from worker.node_metrics import show_joined, show_silence
from worker.node_sockets import EngineEnds, listen
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

NODES_SERVICE = "diptych.v1.Nodes"
BEATS_PER_SILENCE = 5
"""Signs of life within the longest silence that is borne."""
_HELLO_S = 10.0
_READ_BYTES = 1 << 18
_REMIND_S = 15.0
_LAST_WORD_S = 2.0
_MAX_HOST_CHARS = 255
_GAVE_UP = "the engine gave its ranks up; its log says why"

if TYPE_CHECKING:  # gRPC's classes take type arguments in its stubs only
    Context = grpc.aio.ServicerContext[nodes_pb2.NodeMessage, nodes_pb2.LeaderMessage]


class NodeLostError(Exception):
    """Another node is gone, and this worker with it."""


@dataclass(slots=True, eq=False)
class _Node:
    """Another node, and our end of the socket that the engine takes for its ranks."""

    rank: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    host: str = ""
    """Empty until it has joined."""
    refused: str = ""
    """Why the last one that wanted to join might not."""
    heard_at: float = 0.0

    @property
    def name(self) -> str:
        return f"Node {self.rank} ({self.host})" if self.host else f"Node {self.rank}"


class NodesService(nodes_pb2_grpc.NodesServicer):
    """Answers the other nodes."""

    def __init__(
        self,
        settings: WorkerSettings,
        role: str,
        nodes: Sequence[_Node],
        ends: EngineEnds,
        clock: Clock,
    ) -> None:
        """Use `open`."""
        self._settings = settings
        self._nodes = {node.rank: node for node in nodes}
        self.engine_ends = ends
        self._clock = clock
        self._silence_s = settings.node_timeout_s
        self._agreed = asyncio.create_task(asyncio.to_thread(agreed, settings, role))
        self._lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._last_word: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._streams: set[asyncio.Task[None]] = set()
        self.stopping = asyncio.Event()
        """Set once a node was told to end: let what runs finish."""

    @classmethod
    async def open(cls, settings: WorkerSettings, role: str, clock: Clock) -> "NodesService":
        """Make the sockets.

        Raises:
            ConfigError: the rendezvous port can't be had.
        """
        listener = listen(settings.host, settings.rendezvous_port)
        nodes, ends = [], []
        for rank in range(1, settings.nodes):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            nodes.append(_Node(rank, reader, writer))
            ends.append(theirs)
        return cls(settings, role, nodes, EngineEnds(ends, listener), clock)

    def register(self, registry: CollectorRegistry) -> None:
        """Show how the nodes fare."""
        show_joined(registry, lambda: sum(bool(node.host) for node in self._nodes.values()))
        show_silence(registry, {rank: partial(self._silence, rank) for rank in self._nodes})

    def _silence(self, rank: int) -> float:
        node = self._nodes[rank]
        return self._clock() - node.heard_at if node.host else 0.0

    @property
    def missing(self) -> str:
        """The nodes that have not joined, and why if that is known; empty if all have."""
        return ", ".join(
            f"node {node.rank}" + (f" (refused: {node.refused})" if node.refused else "")
            for node in self._nodes.values()
            if not node.host
        )

    @property
    def lost(self) -> str:
        """Which node was lost first, and how; empty if none was."""
        error = self._lost.result() if self._lost.done() else None
        return str(error) if isinstance(error, NodeLostError) else ""

    async def watch(self) -> None:
        """Remind of nodes that don't come, until one that came is lost.

        Raises:
            NodeLostError: says which and how.
            EngineFailedError: the engine has given up instead.
        """
        while self.missing and not self._lost.done():
            await asyncio.wait({self._lost}, timeout=_REMIND_S)
            if self.missing:
                log.info("waiting for %s of %d to join", self.missing, self._settings.nodes)
        raise await self._lost

    async def dismiss(self, reason: str) -> None:
        """Tell every node that this worker ends and why, and end their streams."""
        if not self._last_word.done():
            self._last_word.set_result(reason)
        for node in self._nodes.values():
            if not node.host:  # the engine may be waiting for it
                node.writer.write(frame(Frame.LOST, b"A node did not join."))
        if self._streams:
            await asyncio.wait(self._streams, timeout=_LAST_WORD_S)

    def close(self) -> None:
        """Close the sockets; the engine has ended."""
        if not self._agreed.cancel() and not self._agreed.cancelled():
            self._agreed.exception()  # which the engine has met too, if nobody joined
        self.engine_ends.close()
        for node in self._nodes.values():
            node.writer.close()

    async def Join(self, request_iterator: object, context: "Context") -> None:
        """Carry one node's frames for as long as its stream lives."""
        node = await self._admit(context)
        stream = asyncio.current_task()
        assert stream is not None
        self._streams.add(stream)
        error: Exception | None = self._lost_node(node, "its connection broke")
        try:
            ends = self.engine_ends.message
            hello = nodes_pb2.LeaderHello(
                rendezvous_port=ends.rendezvous_port,
                rendezvous_name=ends.rendezvous_name,
                silence_ms=int(self._silence_s * 1000),
            )
            await context.write(nodes_pb2.LeaderMessage(hello=hello))
            log.info("node %d of %d joined from %s", node.rank, self._settings.nodes, node.host)
            error = await self._carry(node, context)
        finally:
            self._streams.discard(stream)
            self._end(node, error)

    async def _admit(self, context: "Context") -> _Node:
        try:
            async with asyncio.timeout(_HELLO_S):
                message = await context.read()
        except TimeoutError:
            message = None
        if not isinstance(message, nodes_pb2.NodeMessage) or not message.HasField("hello"):
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "A node says hello first.")
        hello, host = message.hello, message.hello.host[:_MAX_HOST_CHARS] or context.peer()
        node = self._nodes.get(hello.node_rank)
        if node is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"There is no node {hello.node_rank} here: nodes is {self._settings.nodes}.",
            )
        try:
            ours = await asyncio.shield(self._agreed)
        except DiptychError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"The leader: {error.message}")
        node.refused = differences(ours, hello.agreed, node.rank)
        if node.refused:
            log.error("node %d at %s may not join: %s", node.rank, host, node.refused)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, node.refused)
        if node.host or self._lost.done():
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS, f"{node.name} had joined; this worker restarts."
            )
        node.host = host
        node.heard_at = self._clock()
        return node

    async def _carry(self, node: _Node, context: "Context") -> Exception | None:
        """Move frames both ways; what that ended with, None if rank 0 asked for it."""
        up = asyncio.create_task(self._from_node(node, context))
        down = asyncio.create_task(self._to_node(node, context))
        try:
            tasks: set[asyncio.Future[Any]] = {up, down, self._last_word}
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(up, down)
        failures = [task.exception() for task in (up, down) if not task.cancelled()]
        gave_up = [error for error in failures if isinstance(error, EngineFailedError)]
        if not up.cancelled() and up.exception() is None:
            reason = up.result()
            return self._lost_node(node, reason) if reason else None
        if self._last_word.done():
            error: Exception = NodeLostError(self._last_word.result())
        elif gave_up:
            error = gave_up[0]
        else:
            return self._lost_node(node, "its connection broke")
        with suppress(Exception):
            end = nodes_pb2.NodeEnd(reason=str(error))
            await context.write(nodes_pb2.LeaderMessage(end=end))
        return error

    async def _from_node(self, node: _Node, context: "Context") -> str:
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await context.read()
            except TimeoutError:
                return f"no sign of life for {self._silence_s:.1f} s"
            if not isinstance(message, nodes_pb2.NodeMessage):
                return "its connection broke"
            node.heard_at = self._clock()
            match message.WhichOneof("body"):
                case "frames":
                    node.writer.write(message.frames)
                    try:
                        await node.writer.drain()
                    except OSError:
                        raise EngineFailedError(_GAVE_UP) from None
                case "stopping":
                    log.info("%s was told to end", node.name)
                    self.stopping.set()
                case "end":
                    return message.end.reason

    async def _to_node(self, node: _Node, context: "Context") -> None:
        while True:
            message = nodes_pb2.LeaderMessage()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._silence_s / BEATS_PER_SILENCE):
                    with suppress(ConnectionError):
                        message.frames = await node.reader.read(_READ_BYTES)
                if not message.frames:
                    raise EngineFailedError(_GAVE_UP)
            await context.write(message)

    @staticmethod
    def _lost_node(node: _Node, reason: str) -> NodeLostError:
        return NodeLostError(f"{node.name} was lost: {reason}.")

    def _end(self, node: _Node, error: Exception | None) -> None:
        if error is not None and not self._lost.done():
            self._lost.set_result(error)
        if isinstance(error, NodeLostError):
            node.writer.write(frame(Frame.LOST, str(error).encode()))
        node.writer.close()


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
