"""Streams of a worker that are slow or break on purpose. Only there while faults are on."""

from collections.abc import AsyncIterator, Callable

from rpc.v1 import ipc_pb2
from telemetry.faults import Faults, InjectedFaultError, Point
from worker.ipc import ServicePipe
from worker.switchboard import FIRST_ENGINE_CHANNEL, Channel, In, Out, Switchboard


class FaultySwitchboard(Switchboard):
    """A switchboard whose channels pass the fault points of streams."""

    def __init__(self, pipe: ServicePipe, faults: Faults) -> None:
        """As a switchboard of `pipe`."""
        super().__init__(pipe)
        self._faults = faults

    def open(self, number: int | None = None) -> Channel[Out]:
        """See Switchboard; a channel that the engine asked for may be closed already."""
        channel: Channel[Out] = self._add(_FaultyChannel(self._numbered(number), self._faults))
        rule = self._faults.at(Point.LINK_OPEN) if channel.number >= FIRST_ENGINE_CHANNEL else None
        if rule is not None:
            channel.close(f"injected fault {rule.point}:{rule.effect}")
        return channel

    async def pump(
        self,
        channel: Channel[Out],
        incoming: AsyncIterator[In],
        wrap: Callable[[int, In], ipc_pb2.EngineCommand],
    ) -> None:
        """See Switchboard."""
        await super().pump(channel, self._passing(incoming), wrap)

    async def _passing(self, incoming: AsyncIterator[In]) -> AsyncIterator[In]:
        async for message in incoming:
            await self._faults.link(Point.LINK_RECEIVE)
            yield message


class _FaultyChannel(Channel[Out]):
    def __init__(self, number: int, faults: Faults) -> None:
        super().__init__(number)
        self._faults = faults

    async def outgoing(self) -> AsyncIterator[Out]:
        async for message in super().outgoing():
            try:
                await self._faults.link(Point.LINK_SEND)
            except InjectedFaultError as error:
                self.close(str(error))
                return
            yield message
