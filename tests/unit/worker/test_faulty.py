"""Engine loops that fail on purpose end what they had with a cause, and lose no block."""

import pytest

from rpc.v1 import ipc_pb2, kv_export_pb2, worker_pb2
from telemetry.faults import Faults, parse_faults
from tests.support.fake_executor import undisturbed
from tests.support.loops import Pair
from tests.unit.worker.test_switchboard import HELLO, RecordingPipe, collect, frame
from worker.faulty_links import FaultySwitchboard
from worker.switchboard import FIRST_ENGINE_CHANNEL, Channel

PROMPT = list(range(1, 31))


@pytest.mark.parametrize("effect", ["fail", "short"])
def test_a_spoilt_read_fails_the_handover_and_nothing_of_it_is_used(effect: str) -> None:
    pair = Pair(faults=f"kv.read:{effect}")
    pair.submit(PROMPT)
    pair.run()
    pair.settle()
    (end,) = pair.decode.finished()
    assert end.error_code == "kv_transfer_failed" and f"kv.read:{effect}" in end.error_message
    assert pair.decode.tokens() == []
    assert pair.decode.balanced and pair.prefill.balanced


def test_a_late_read_is_only_late() -> None:
    pair = Pair(faults="kv.read:delay=300ms")
    params = pair.submit(PROMPT)
    pair.run()
    pair.settle()
    assert pair.clock.now >= 0.3
    assert pair.decode.tokens() == undisturbed(PROMPT, params)
    assert pair.decode.balanced and pair.prefill.balanced


def test_a_worker_without_signs_of_life_is_not_trusted() -> None:
    pair = Pair(faults="lease.renew:lost")
    pair.submit(PROMPT)
    pair.run(2000)
    (end,) = pair.decode.finished()
    assert end.error_code == "kv_transfer_failed"
    pair.settle(2000)
    assert pair.decode.balanced and pair.prefill.balanced


def test_a_lost_probe_keeps_no_block() -> None:
    pair = Pair(num_blocks=256, probe_blocks=8, faults="kv.probe:lost")
    params = pair.submit(PROMPT)
    pair.run()
    pair.settle(3000)
    assert pair.decode.tokens() == undisturbed(PROMPT, params)
    assert pair.prefill.balanced
    pair.decode.engine.check_integrity()
    assert not pair.decode.engine.stats().held_blocks


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_that_raises_fails_its_requests_alone(overlaps: bool) -> None:
    pair = Pair(faults="engine.step:raise@0.4;seed=2", overlaps=overlaps)
    for number in range(8):
        pair.submit(PROMPT, request_id=f"r{number}")
    pair.settle(400)
    ends = [pair.decode.finished(f"r{number}") for number in range(8)]
    assert all(len(end) == 1 for end in ends)
    assert any("engine.step:raise" in end[0].error_message for end in ends)
    assert pair.decode.balanced and pair.prefill.balanced


def test_a_request_is_refused_as_by_a_worker_that_can_take_none() -> None:
    pair = Pair(faults="submit:refuse")
    pair.submit(PROMPT)
    pair.turn()
    for side in (pair.prefill, pair.decode):
        (end,) = side.finished()
        assert end.reason == worker_pb2.FINISH_REASON_FAILED and end.error_code == "unavailable"
        assert side.balanced


async def test_a_channel_is_cut_when_it_is_written_to() -> None:
    pipe = RecordingPipe()
    board = FaultySwitchboard(pipe, Faults(parse_faults("rpc.link.send:cut")))  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        board.to_router(frame(channel.number, HELLO))
        assert await collect(channel) == []
    assert "rpc.link.send:cut" in pipe.sent[0].closed.reason


async def test_a_stream_is_cut_when_it_is_read_from() -> None:
    async def incoming() -> "object":
        yield worker_pb2.RouterMessage()

    pipe = RecordingPipe()
    board = FaultySwitchboard(pipe, Faults(parse_faults("rpc.link.receive:cut")))  # type: ignore[arg-type]
    channel: Channel[worker_pb2.WorkerMessage] = board.open()
    with board.serving(channel):
        await board.pump(channel, incoming(), lambda number, message: ipc_pb2.EngineCommand())
    assert len(pipe.sent) == 1 and "rpc.link.receive:cut" in pipe.sent[0].closed.reason


async def test_only_what_the_engine_dials_is_refused() -> None:
    board = FaultySwitchboard(RecordingPipe(), Faults(parse_faults("rpc.link.open:refuse")))  # type: ignore[arg-type]
    accepted: Channel[kv_export_pb2.PrefillMessage] = board.open()
    dialled: Channel[kv_export_pb2.DecodeMessage] = board.open(FIRST_ENGINE_CHANNEL + 1)
    assert not accepted.close_reason
    assert "rpc.link.open:refuse" in dialled.close_reason
