"""What the service process says of its engine."""

import asyncio

from rpc.v1 import ipc_pb2, worker_pb2
from tests.support.engine import FakeClock
from worker.service import EngineView, WorkerService
from worker.switchboard import Channel, Switchboard


class AnsweringPipe:
    """An engine that answers each drain when the test lets it."""

    def __init__(self) -> None:
        self.calls: list[ipc_pb2.AdminCall] = []

    def send(self, command: ipc_pb2.EngineCommand) -> None:
        if command.HasField("call"):
            self.calls.append(command.call)


async def test_routers_hear_of_a_drain_before_the_engine_does() -> None:
    """Scale-down in two phases: marked as draining first, so that nothing new comes."""
    # Met elsewhere: Scaling down killed what was under way.
    clock, pipe = FakeClock(), AnsweringPipe()
    board = Switchboard(pipe)  # type: ignore[arg-type]
    view = EngineView(stall_after_s=9, clock=clock)
    view.description = worker_pb2.WorkerDescription(worker_id="w")
    view.on_heartbeat(
        ipc_pb2.Heartbeat(load=worker_pb2.LoadReport(state=worker_pb2.WORKER_STATE_READY))
    )
    assert view.ready
    service = WorkerService(pipe, board, view)  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        channel.attached = True
        draining = asyncio.create_task(service.drain(worker_pb2.DrainRequest(timeout_ms=1000)))
        report = await asyncio.wait_for(anext(channel.outgoing()), 5)
        assert report.load.state == worker_pb2.WORKER_STATE_DRAINING
        assert not view.ready and not draining.done()
        reply = worker_pb2.DrainResponse(drained=True)
        service.on_reply(ipc_pb2.AdminReply(id=pipe.calls[0].id, drain=reply))
        assert (await draining).drained
        resuming = asyncio.create_task(service.drain(worker_pb2.DrainRequest(resume=True)))
        await asyncio.wait_for(anext(channel.outgoing()), 5)
        assert view.ready
        service.on_reply(ipc_pb2.AdminReply(id=pipe.calls[1].id, drain=reply))
        await resuming
