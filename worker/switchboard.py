"""Joins gRPC streams to the engine's pipe, each stream under a channel number.

Lives in the service process. It understands no message: what arrives on a stream goes to the
engine tagged with the channel, what the engine addresses to a channel goes out on its stream. A
stream whose peer does not read is closed when its bounded queue is full.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Generic, TypeVar

from rpc.v1 import ipc_pb2
from worker.ipc import ServicePipe

log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

EVERY_ROUTER = 0
FIRST_ENGINE_CHANNEL = 1 << 32
"""Channels from here on are numbered by the engine, those below by the service."""
_QUEUE_MESSAGES = 16_384


class Channel(Generic[Out]):
    """One stream: what waits to go out on it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.attached = False
        """True once a router has got its hello; broadcasts reach it from then on."""
        self.close_reason = ""
        self._queue: asyncio.Queue[Out | None] = asyncio.Queue(_QUEUE_MESSAGES)
        self._closed = False

    def put(self, message: Out) -> None:
        """Queue a message; closes the channel instead if its peer has stopped reading."""
        if self._closed:
            return
        if self._queue.qsize() >= _QUEUE_MESSAGES - 1:
            self.close(f"the peer left {_QUEUE_MESSAGES} messages unread")
            return
        self._queue.put_nowait(message)

    def close(self, reason: str) -> None:
        """End the stream after what is queued."""
        if not self._closed:
            self._closed = True
            self.close_reason = reason
            self._queue.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[Out]:
        """Messages to write, until the channel is closed."""
        while (message := await self._queue.get()) is not None:
            yield message


class Switchboard:
    """All open channels of one worker."""

    def __init__(self, pipe: ServicePipe) -> None:
        self._pipe = pipe
        self._channels: dict[int, Channel[object]] = {}
        self._numbers = itertools.count(1)
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._channels)

    def open(self, number: int | None = None) -> Channel[Out]:
        """Open a channel; what the engine addresses to it is queued from now on."""
        return self._add(Channel(self._numbered(number)))

    def _numbered(self, number: int | None) -> int:
        return next(self._numbers) if number is None else number

    def _add(self, channel: Channel[Out]) -> Channel[Out]:
        self._channels[channel.number] = channel  # type: ignore[assignment]
        self._empty.clear()
        return channel

    @contextmanager
    def serving(self, channel: Channel[Out]) -> Iterator[Channel[Out]]:
        """For as long as a channel's stream lives; the engine hears when it ends."""
        try:
            yield channel
        finally:
            channel.close("the stream ended")
            del self._channels[channel.number]
            if not self._channels:
                self._empty.set()
            closed = ipc_pb2.ChannelClosed(channel=channel.number, reason=channel.close_reason)
            self._pipe.send(ipc_pb2.EngineCommand(closed=closed))

    async def pump(
        self,
        channel: Channel[Out],
        incoming: AsyncIterator[In],
        wrap: Callable[[int, In], ipc_pb2.EngineCommand],
    ) -> None:
        """Forward a stream's messages to the engine until it ends; then close the channel."""
        reason = "the peer ended the stream"
        try:
            async for message in incoming:
                self._pipe.send(wrap(channel.number, message))
                await self._pipe.drain()
        except Exception as error:
            reason = f"the stream broke: {error}"
        finally:
            channel.close(reason)

    @asynccontextmanager
    async def carrying(
        self,
        channel: Channel[Out],
        incoming: AsyncIterator[In],
        wrap: Callable[[int, In], ipc_pb2.EngineCommand],
    ) -> AsyncIterator[AsyncIterator[Out]]:
        """Serve a channel with a stream that was opened to us; gives what is to go out on it."""
        with self.serving(channel):
            pump = asyncio.create_task(self.pump(channel, incoming, wrap))
            try:
                yield channel.outgoing()
            finally:
                pump.cancel()
                with suppress(asyncio.CancelledError):
                    await pump

    def to_router(self, frame: ipc_pb2.WorkerFrame) -> None:
        """A frame for one router, or for all of them."""
        if frame.channel == EVERY_ROUTER:
            self.broadcast(frame.message)
            return
        channel = self._channels.get(frame.channel)
        if channel is not None:
            channel.attached |= frame.message.HasField("hello")
            channel.put(frame.message)

    def to_peer(self, frame: ipc_pb2.PrefillFrame | ipc_pb2.DecodeFrame) -> None:
        """A frame for the worker at the other end of a KvExport link."""
        channel = self._channels.get(frame.channel)
        if channel is not None:
            channel.put(frame.message)

    def broadcast(self, message: object) -> None:
        """A message for every attached router."""
        for channel in list(self._channels.values()):
            if channel.attached:
                channel.put(message)

    def close(self, number: int, reason: str) -> None:
        """End one channel, at the engine's request."""
        channel = self._channels.get(number)
        if channel is not None:
            channel.close(reason)

    async def close_all(self, reason: str) -> None:
        """End every channel, and wait until what was queued has gone out and the streams ended."""
        for channel in list(self._channels.values()):
            channel.close(reason)
        await self._empty.wait()
