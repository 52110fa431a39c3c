"""Streams and channels of the service process."""

import asyncio
from collections.abc import AsyncIterator

from rpc.v1 import ipc_pb2, kv_export_pb2, worker_pb2
from worker import switchboard as switchboard_module
from worker.switchboard import EVERY_ROUTER, Channel, Switchboard


class RecordingPipe:
    """Keeps what the service would have sent to the engine."""

    def __init__(self) -> None:
        self.sent: list[ipc_pb2.EngineCommand] = []

    def send(self, command: ipc_pb2.EngineCommand) -> None:
        self.sent.append(command)

    async def drain(self) -> None:
        pass


def frame(channel: int, message: worker_pb2.WorkerMessage) -> ipc_pb2.WorkerFrame:
    return ipc_pb2.WorkerFrame(channel=channel, message=message)


HELLO = worker_pb2.WorkerMessage(hello=worker_pb2.WorkerDescription(worker_id="w"))
LOAD = worker_pb2.WorkerMessage(load=worker_pb2.LoadReport(running=3))


async def collect(channel: Channel[worker_pb2.WorkerMessage]) -> list[worker_pb2.WorkerMessage]:
    async with asyncio.timeout(5):
        return [message async for message in channel.outgoing()]


async def test_broadcasts_reach_only_routers_that_got_their_hello() -> None:
    board = Switchboard(RecordingPipe())  # type: ignore[arg-type]
    first: Channel[worker_pb2.WorkerMessage] = board.open()
    second: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(first), board.serving(second):
        board.to_router(frame(first.number, HELLO))
        board.to_router(frame(EVERY_ROUTER, LOAD))
        first.close("test")
        second.close("test")
        assert await collect(first) == [HELLO, LOAD]
        assert await collect(second) == []


async def test_the_engine_hears_when_a_stream_ends_and_why() -> None:
    pipe = RecordingPipe()
    board = Switchboard(pipe)  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        channel.close("the router went away")
    assert [c.closed.channel for c in pipe.sent] == [channel.number]
    assert pipe.sent[0].closed.reason == "the router went away"
    assert len(board) == 0


async def test_messages_to_a_channel_that_ended_are_dropped() -> None:
    board = Switchboard(RecordingPipe())  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        pass
    board.to_router(frame(channel.number, LOAD))


async def test_a_peer_that_does_not_read_is_closed_not_buffered_without_bound() -> None:
    board = Switchboard(RecordingPipe())  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        for _ in range(switchboard_module._QUEUE_MESSAGES + 10):
            channel.put(LOAD)
        assert "unread" in channel.close_reason
        assert len(await collect(channel)) == switchboard_module._QUEUE_MESSAGES - 1


async def test_pump_forwards_in_order_and_closes_the_channel_at_the_end() -> None:
    pipe = RecordingPipe()
    board = Switchboard(pipe)  # type: ignore[arg-type]

    async def incoming() -> AsyncIterator[worker_pb2.RouterMessage]:
        for i in range(3):
            yield worker_pb2.RouterMessage(abort=worker_pb2.Abort(request_id=str(i)))
        raise ConnectionError("cut")

    def wrap(channel: int, message: worker_pb2.RouterMessage) -> ipc_pb2.EngineCommand:
        return ipc_pb2.EngineCommand(router=ipc_pb2.RouterFrame(channel=channel, message=message))

    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        await board.pump(channel, incoming(), wrap)
        assert [c.router.message.abort.request_id for c in pipe.sent] == ["0", "1", "2"]
        assert await collect(channel) == []
        assert "cut" in channel.close_reason


async def test_a_frame_right_behind_the_opening_is_queued() -> None:
    board = Switchboard(RecordingPipe())  # type: ignore[arg-type]
    channel: Channel[kv_export_pb2.DecodeMessage] = board.open(1 << 32)
    hello = kv_export_pb2.DecodeMessage(hello=kv_export_pb2.LinkHello(worker_id="d"))
    board.to_peer(ipc_pb2.DecodeFrame(channel=1 << 32, message=hello))
    with board.serving(channel):
        channel.close("test")
        assert [message async for message in channel.outgoing()] == [hello]


async def test_close_all_lets_out_what_is_queued_and_waits_for_the_streams_to_end() -> None:
    board = Switchboard(RecordingPipe())  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        board.to_router(frame(channel.number, HELLO))
        closing = asyncio.create_task(board.close_all("the worker is ending"))
        assert await collect(channel) == [HELLO]
        assert not closing.done(), "its stream has not ended"
    async with asyncio.timeout(5):
        await closing
    assert channel.close_reason == "the worker is ending"
