"""An Attach stream that is slow or breaks on purpose. Only there while faults are on."""

import asyncio
from collections.abc import Callable

import grpc

from router.fleet.link import Stream, attach
from rpc.v1 import worker_pb2
from telemetry.faults import Faults, InjectedFaultError, Point


def attach_with(faults: Faults) -> Callable[[grpc.aio.Channel], Stream]:
    """How links attach: as ever, unless a fault point of streams is on."""
    if not faults.has(Point.LINK_OPEN, Point.LINK_SEND, Point.LINK_RECEIVE):
        return attach
    return lambda channel: _FaultyStream(attach(channel), faults)


class _FaultyStream:
    """Implements Stream. A cut shows as InvalidStateError, as on a stream that broke by itself."""

    def __init__(self, inner: Stream, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._opened = False

    async def read(self) -> object:
        message = await self._inner.read()
        await self._pass(Point.LINK_RECEIVE)
        return message

    async def write(self, request: worker_pb2.RouterMessage) -> None:
        await self._pass(Point.LINK_SEND if self._opened else Point.LINK_OPEN)
        self._opened = True
        await self._inner.write(request)

    async def _pass(self, point: Point) -> None:
        try:
            await self._faults.link(point)
        except InjectedFaultError as error:
            raise asyncio.InvalidStateError(str(error)) from None
