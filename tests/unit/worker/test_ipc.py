"""The pipe between service and engine process."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.v1 import ipc_pb2, worker_pb2
from worker.ipc import MAX_FRAME_BYTES, EnginePipe, PipeClosedError, ServicePipe, open_pipe


def submit(request_id: str, prompt_len: int) -> ipc_pb2.EngineCommand:
    message = worker_pb2.RouterMessage(
        submit=worker_pb2.Submit(request_id=request_id, prompt_ids=range(prompt_len))
    )
    return ipc_pb2.EngineCommand(router=ipc_pb2.RouterFrame(channel=7, message=message))


async def test_commands_of_any_size_arrive_whole_and_in_order() -> None:
    ours, theirs = open_pipe()
    service, engine = await ServicePipe.open(ours), EnginePipe(theirs)
    sent = [submit(f"r{i}", size) for i, size in enumerate([0, 1, 200_000, 3])]
    for command in sent:
        service.send(command)
    received: list[ipc_pb2.EngineCommand] = []
    async with asyncio.timeout(10):
        while len(received) < len(sent):
            await asyncio.sleep(0)
            received += engine.receive(0.0)
    assert received == sent
    engine.close()
    service.close()


async def test_events_arrive_while_the_service_is_slow_to_read() -> None:
    ours, theirs = open_pipe()
    service, engine = await ServicePipe.open(ours), EnginePipe(theirs)
    events = [
        ipc_pb2.EngineEvent(heartbeat=ipc_pb2.Heartbeat(metrics=bytes(1 << 20))) for _ in range(16)
    ]

    def send_all() -> None:
        for event in events:
            engine.send(event)
        engine.close()

    sending = asyncio.create_task(asyncio.to_thread(send_all))
    async with asyncio.timeout(10):
        received = [event async for event in service.events()]
        await sending
    assert received == events
    service.close()


async def test_end_of_the_service_is_noticed_by_the_engine() -> None:
    ours, theirs = open_pipe()
    engine = EnginePipe(theirs)
    ours.close()
    with pytest.raises(PipeClosedError):
        engine.receive(5.0)
    engine.close()


async def test_a_service_that_stops_reading_does_not_hang_the_engine_for_ever() -> None:
    ours, theirs = open_pipe()
    engine = EnginePipe(theirs, send_timeout_s=0.05)
    event = ipc_pb2.EngineEvent(heartbeat=ipc_pb2.Heartbeat(metrics=bytes(64 << 20)))
    with pytest.raises(PipeClosedError, match="stopped reading"):
        engine.send(event)
    engine.close()
    ours.close()


def test_a_corrupt_length_is_refused_before_it_is_allocated() -> None:
    ours, theirs = open_pipe()
    ours.send((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    engine = EnginePipe(theirs)
    with pytest.raises(PipeClosedError, match="exceeds"):
        engine.receive(1.0)
    engine.close()
    ours.close()


@given(
    cuts=st.lists(st.integers(1, 60), max_size=20), sizes=st.lists(st.integers(0, 9), max_size=5)
)
def test_frames_survive_any_cut_of_the_stream(cuts: list[int], sizes: list[int]) -> None:
    ours, theirs = open_pipe()
    engine = EnginePipe(theirs)
    sent = [submit(f"r{i}", size) for i, size in enumerate(sizes)]
    data = b"".join(
        len(body).to_bytes(4, "little") + body for body in (c.SerializeToString() for c in sent)
    )
    received: list[ipc_pb2.EngineCommand] = []
    for cut in [*cuts, len(data)]:
        ours.send(data[:cut])
        data = data[cut:]
        received += engine.receive(0.0)
    assert received == sent
    engine.close()
    ours.close()
