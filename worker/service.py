"""The Worker gRPC service: streams in and out of the switchboard, and the unary admin verbs."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from core.clock import Clock
from rpc.v1 import ipc_pb2, worker_pb2, worker_pb2_grpc
from worker.ipc import ServicePipe
from worker.switchboard import Channel, Switchboard

log = logging.getLogger(__name__)

_ADMIN_TIMEOUT_S = 30.0


class EngineView:
    """What the service process knows of its engine, from the engine's own words and their age."""

    def __init__(self, *, stall_after_s: float, clock: Clock) -> None:
        self._stall_after_s = stall_after_s
        self._clock = clock
        self._load = worker_pb2.LoadReport()
        self._beat_at = clock()
        self._made_at = self._beat_at
        self._ready_after_s: float | None = None
        self.description: worker_pb2.WorkerDescription | None = None
        self.metrics = b""
        self.draining = False
        """True from when the engine was told to drain; its own word for it comes later."""

    def on_heartbeat(self, heartbeat: ipc_pb2.Heartbeat) -> None:
        """The loop turned."""
        self._load = heartbeat.load
        self._beat_at = self._clock()
        if heartbeat.metrics:
            self.metrics = heartbeat.metrics

    def on_ready(self, description: worker_pb2.WorkerDescription) -> None:
        """The engine was built."""
        self.description = description
        self._ready_after_s = self._clock() - self._made_at

    @property
    def startup_s(self) -> float:
        """Seconds that the engine took to be built, or has taken so far."""
        if self._ready_after_s is not None:
            return self._ready_after_s
        return self._clock() - self._made_at

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the loop last turned."""
        return self._clock() - self._beat_at

    @property
    def live(self) -> bool:
        """True while the loop turns, or the engine is still being built."""
        return self.description is None or self.heartbeat_age_s <= self._stall_after_s

    @property
    def ready(self) -> bool:
        """True if a request would be admitted now."""
        return (
            self.description is not None
            and self.live
            and not self.draining
            and self._load.state == worker_pb2.WORKER_STATE_READY
        )

    def load(self) -> worker_pb2.LoadReport:
        """The latest load with the heartbeat's age as of now."""
        report = worker_pb2.LoadReport()
        report.CopyFrom(self._load)
        report.heartbeat_age_ms = int(self.heartbeat_age_s * 1000)
        if not self.live:
            report.state = worker_pb2.WORKER_STATE_STALLED
        elif self.draining:
            report.state = worker_pb2.WORKER_STATE_DRAINING
        return report


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Answers routers and administrators."""

    def __init__(self, pipe: ServicePipe, switchboard: Switchboard, engine: EngineView) -> None:
        self._pipe = pipe
        self._switchboard = switchboard
        self._engine = engine
        self._calls: dict[int, asyncio.Future[ipc_pb2.AdminReply]] = {}
        self._call_ids = itertools.count(1)

    async def Attach(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: "grpc.aio.ServicerContext[worker_pb2.RouterMessage, worker_pb2.WorkerMessage]",
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """Carry a router's requests for as long as its stream lives."""
        await self._require_engine(context)
        channel: Channel[worker_pb2.WorkerMessage] = self._switchboard.open()
        carrying = self._switchboard.carrying(channel, request_iterator, _router_command)
        log.info("router attached from %s (channel %d)", context.peer(), channel.number)
        try:
            async with carrying as outgoing:
                async for message in outgoing:
                    yield message
        finally:
            log.info("router left (channel %d): %s", channel.number, channel.close_reason)

    async def Describe(
        self,
        request: worker_pb2.DescribeRequest,
        context: (
            "grpc.aio.ServicerContext[worker_pb2.DescribeRequest, worker_pb2.DescribeResponse]"
        ),
    ) -> worker_pb2.DescribeResponse:
        """Say who this worker is and how busy."""
        await self._require_engine(context)
        return worker_pb2.DescribeResponse(
            worker=self._engine.description, load=self._engine.load()
        )

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,
        context: "grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse]",
    ) -> worker_pb2.DrainResponse:
        """Stop admission and wait for what runs, or resume."""
        await self._require_engine(context)
        return await self.drain(request)

    async def FlushCache(
        self,
        request: worker_pb2.FlushCacheRequest,
        context: (
            "grpc.aio.ServicerContext[worker_pb2.FlushCacheRequest, worker_pb2.FlushCacheResponse]"
        ),
    ) -> worker_pb2.FlushCacheResponse:
        """Forget cached blocks that nothing holds."""
        await self._require_engine(context)
        reply = await self._call(ipc_pb2.AdminCall(flush_cache=request), _ADMIN_TIMEOUT_S)
        return reply.flush_cache

    async def drain(self, request: worker_pb2.DrainRequest) -> worker_pb2.DrainResponse:
        """Drain from within this process.

        Raises:
            TimeoutError: the engine did not answer within its time and a margin.
        """
        self._engine.draining = not request.resume
        # Routers must not go on placing requests here until the next regular report.
        self._switchboard.broadcast(worker_pb2.WorkerMessage(load=self._engine.load()))
        timeout_s = request.timeout_ms / 1000 + _ADMIN_TIMEOUT_S
        reply = await self._call(ipc_pb2.AdminCall(drain=request), timeout_s)
        return reply.drain

    def on_reply(self, reply: ipc_pb2.AdminReply) -> None:
        """The engine answered an admin call."""
        future = self._calls.get(reply.id)
        if future is not None and not future.done():
            future.set_result(reply)

    async def _call(self, call: ipc_pb2.AdminCall, timeout_s: float) -> ipc_pb2.AdminReply:
        call.id = next(self._call_ids)
        future: asyncio.Future[ipc_pb2.AdminReply] = asyncio.get_running_loop().create_future()
        self._calls[call.id] = future
        self._pipe.send(ipc_pb2.EngineCommand(call=call))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            del self._calls[call.id]

    async def _require_engine(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        if self._engine.description is None:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "The worker is still loading its model; try again."
            )


def _router_command(channel: int, message: worker_pb2.RouterMessage) -> ipc_pb2.EngineCommand:
    return ipc_pb2.EngineCommand(router=ipc_pb2.RouterFrame(channel=channel, message=message))
