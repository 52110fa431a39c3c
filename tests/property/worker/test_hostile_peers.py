"""Engine loops whose routers and peers send anything: nothing is lost, nobody is left unanswered.

The loops are the real ones, on executors that compute nothing. Every message is of the right type,
since gRPC has seen to that (tests/e2e/test_hostile_bytes.py is about bytes that are not).
"""

import struct
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.block_hash import hash_blocks, root_hash
from core.sampling import SamplingParams
from router.fleet.wire import sampling_to_proto
from rpc.v1 import ipc_pb2, kv_export_pb2, worker_pb2
from tests.support.engine import FakeClock
from tests.support.fake_executor import DIGEST
from tests.support.loops import BLOCK_SIZE, Pair, Side, make_side
from tests.support.protobuf import messages
from worker.ipc import EnginePipe, PipeClosedError, open_pipe

CHANNELS = st.integers(1, 2)
FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def likely_submits(draw: st.DrawFn) -> worker_pb2.RouterMessage:
    """Submissions that would be taken but for what a random one says otherwise."""
    prompt = draw(st.lists(st.integers(0, 96), min_size=1, max_size=12))
    submit = worker_pb2.Submit(
        request_id=draw(st.sampled_from(["r", "s", "t"])),
        attempt=draw(st.integers(0, 2)),
        prompt_ids=prompt,
        sampling=sampling_to_proto(
            SamplingParams(max_tokens=draw(st.integers(1, 6)), ignore_eos=True)
        ),
        deadline_ms=draw(st.sampled_from([0, 5, 10_000, 2**32 - 1])),
        block_hashes=b"".join(hash_blocks(prompt, BLOCK_SIZE, root_hash(DIGEST))),
    )
    match draw(st.integers(0, 3)):
        case 0:
            submit.export.decode_worker_id = "decode"
        case 1:
            source = getattr(submit, "import")
            source.prefill_worker_id, source.prefill_epoch = "prefill", 7
            source.kv_address = "prefill:1"
        case _:
            submit.local.SetInParent()
    if draw(st.integers(0, 2)) == 0:
        submit.MergeFrom(draw(messages(worker_pb2.Submit)))
    return worker_pb2.RouterMessage(submit=submit)


FROM_ROUTERS = st.builds(
    lambda channel, message: ipc_pb2.EngineCommand(
        router=ipc_pb2.RouterFrame(channel=channel, message=message)
    ),
    CHANNELS,
    messages(worker_pb2.RouterMessage) | likely_submits() | likely_submits(),
)
FROM_DECODE = st.builds(
    lambda channel, message: ipc_pb2.EngineCommand(
        decode=ipc_pb2.DecodeFrame(channel=channel, message=message)
    ),
    st.integers(8, 9),
    messages(kv_export_pb2.DecodeMessage),
)
CLOSED = st.builds(
    lambda channel: ipc_pb2.EngineCommand(closed=ipc_pb2.ChannelClosed(channel=channel)),
    st.sampled_from([1, 2, 8, 9, 77]),
)
CALLS = messages(ipc_pb2.AdminCall).map(lambda call: ipc_pb2.EngineCommand(call=call))


def settle(side: Side, clock: FakeClock) -> None:
    """Let everything end that has a deadline."""
    for channel in (1, 2, 8, 9):
        closed = ipc_pb2.ChannelClosed(channel=channel, reason="over")
        side.pipe.inbox.append(ipc_pb2.EngineCommand(closed=closed))
    for _ in range(12):
        side.loop.turn()
        clock.now += 5.0
    assert side.balanced


def check_ends(side: Side) -> None:
    """No attempt was told twice that it ended, but for those that were refused as known already."""
    ends = Counter(
        (event.worker.channel, end.request_id, end.attempt)
        for event in side.pipe.sent
        for end in [event.worker.message.finished]
        if event.worker.message.HasField("finished") and "already" not in end.error_message
    )
    submitted = Counter(side.submitted)  # type: ignore[attr-defined]
    assert all(count <= submitted[key] for key, count in ends.items())


@pytest.mark.parametrize("role", ["prefill", "decode"])
@given(st.lists(FROM_ROUTERS | FROM_ROUTERS | CLOSED | CALLS | FROM_DECODE, max_size=14))
@FUZZ
def test_routers_and_peers_of_any_kind(role: str, commands: list[ipc_pb2.EngineCommand]) -> None:
    clock = FakeClock()
    side = make_side(role, clock=clock, pools={}, num_blocks=16)
    submitted = []
    for command in commands:
        if command.WhichOneof("body") == "decode" and role != "prefill":
            continue  # its service has no such stream
        if command.router.message.HasField("submit"):
            submit = command.router.message.submit
            submitted.append((command.router.channel, submit.request_id, submit.attempt))
        side.pipe.inbox.append(command)
        side.loop.turn()
        clock.now += 0.01
    side.submitted = submitted  # type: ignore[attr-defined]
    settle(side, clock)
    check_ends(side)


@given(st.lists(messages(kv_export_pb2.PrefillMessage), max_size=10), st.integers(0, 8))
@FUZZ
def test_a_prefill_worker_of_any_kind(
    answers: list[kv_export_pb2.PrefillMessage], before: int
) -> None:
    """It answers rightly for a while, and then with anything."""
    pair = Pair()
    pair.submit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    for _ in range(before):
        pair.turn()
    for answer in answers:
        for link in pair.links or {1 << 32}:
            frame = ipc_pb2.PrefillFrame(channel=link, message=answer)
            pair.decode.pipe.inbox.append(ipc_pb2.EngineCommand(prefill=frame))
        pair.turn()
    pair.cut()
    pair.abort()
    for side in (pair.prefill, pair.decode):
        settle(side, pair.clock)


@given(st.lists(messages(kv_export_pb2.DecodeMessage), max_size=10), st.integers(0, 8))
@FUZZ
def test_a_decode_worker_of_any_kind(
    messages: list[kv_export_pb2.DecodeMessage], before: int
) -> None:
    pair = Pair()
    pair.submit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    for _ in range(before):
        pair.turn()
    for message in messages:
        for link in pair.links or {1 << 32}:
            frame = ipc_pb2.DecodeFrame(channel=link, message=message)
            pair.prefill.pipe.inbox.append(ipc_pb2.EngineCommand(decode=frame))
        pair.turn()
    pair.cut()
    pair.abort()
    for side in (pair.prefill, pair.decode):
        settle(side, pair.clock)


@given(st.binary(max_size=200), st.integers(0, 250))
@settings(max_examples=200, deadline=None)
def test_bytes_of_any_kind_on_the_pipe_are_frames_or_its_end(data: bytes, length: int) -> None:
    ours, theirs = open_pipe()
    engine = EnginePipe(theirs)
    ours.send(struct.pack("<I", length) + data)
    try:
        for command in engine.receive(1.0):
            assert isinstance(command, ipc_pb2.EngineCommand)
    except PipeClosedError as error:
        assert "frame of" in str(error)
    finally:
        engine.close()
        ours.close()
