"""The engine loop: what routers ask and what they are told."""

import pytest
from google.protobuf.message import Message

from core.errors import RETRYABLE
from core.sampling import SamplingParams
from engine.executor import ExecutorLostError
from rpc.token_batch import token_rows
from rpc.v1 import ipc_pb2, worker_pb2
from tests.support.engine import FakeClock
from tests.support.fake_executor import undisturbed
from tests.support.grammar import HeldCompiler, structure
from tests.support.loops import ROUTER, Side, make_side, sampling_to_proto


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def side(clock: FakeClock) -> Side:
    return make_side("decode", clock=clock, pools={}, num_blocks=16)


def submit(
    side: Side, request_id: str = "r", prompt: int = 9, *, salt: int = 0, **fields: object
) -> SamplingParams:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    message = worker_pb2.Submit(
        request_id=request_id,
        attempt=1,
        prompt_ids=[1 + i % 90 for i in range(prompt)],
        sampling=sampling_to_proto(params),
        deadline_ms=10_000,
        block_hashes=b"".join(bytes([salt, i]) * 8 for i in range(prompt // 4)),
        local=worker_pb2.Local(),
    )
    for name, value in fields.items():
        if isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    side.router(submit=message)
    return params


def turn(side: Side, count: int = 12) -> None:
    for _ in range(count):
        side.loop.turn()


def last_finished(side: Side) -> worker_pb2.Finished:
    (end,) = side.finished()
    return end


def test_a_local_request_runs_to_its_end(side: Side) -> None:
    params = submit(side)
    turn(side)
    assert side.tokens() == undisturbed(range(1, 10), params)
    assert last_finished(side).reason == worker_pb2.FINISH_REASON_LENGTH
    assert side.balanced


def test_one_batch_carries_the_tokens_of_all_requests_of_a_step(side: Side) -> None:
    for name in "abc":
        submit(side, name, prompt=3)
    turn(side)
    batches = [
        e.worker.message.tokens for e in side.pipe.sent if e.worker.message.HasField("tokens")
    ]
    assert [row[0] for row in token_rows(batches[-1])] == ["a", "b", "c"]
    assert len(batches) == 5


def test_cached_tokens_come_with_the_first_token_only(side: Side) -> None:
    submit(side)
    turn(side)
    submit(side, "again")
    turn(side)
    cached = [
        cached_tokens
        for event in side.pipe.sent
        for request_id, *_, cached_tokens in token_rows(event.worker.message.tokens)
        if request_id == "again"
    ]
    assert cached[0] == 8 and set(cached[1:]) == {None}


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"prompt": 0}, "invalid_request", "no tokens"),
        ({"prompt": 200}, "context_length_exceeded", "200"),
        ({"block_hashes": b"x"}, "invalid_request", "block_hashes"),
        ({"block_hashes": b"x" * 16 * 9}, "invalid_request", "9 block hashes"),
    ],
)
def test_a_bad_submission_is_refused_with_its_cause(
    side: Side, fields: dict[str, object], code: str, says: str
) -> None:
    submit(side, **fields)  # type: ignore[arg-type]
    turn(side, 2)
    end = last_finished(side)
    assert (end.reason, end.error_code) == (worker_pb2.FINISH_REASON_FAILED, code)
    assert says in end.error_message
    assert side.balanced


def test_a_grammar_that_is_being_compiled_neither_blocks_the_loop_nor_makes_it_spin(
    clock: FakeClock,
) -> None:
    grammars = HeldCompiler()
    side = make_side("decode", clock=clock, pools={}, num_blocks=16, grammars=grammars)
    params = SamplingParams(max_tokens=9, structured=structure(5))
    submit(side, sampling=sampling_to_proto(params))
    turn(side, 3)
    assert 0 < side.pipe.last_timeout_s < 0.01
    grammars.release()
    turn(side)
    assert side.tokens() == undisturbed(range(1, 10), params)
    assert last_finished(side).reason == worker_pb2.FINISH_REASON_STOP
    assert side.pipe.last_timeout_s > 0.01
    assert side.balanced


def test_a_token_outside_the_vocabulary_is_refused(side: Side) -> None:
    message = worker_pb2.Submit(request_id="r", prompt_ids=[5, 97], local=worker_pb2.Local())
    message.sampling.CopyFrom(sampling_to_proto(SamplingParams()))
    side.router(submit=message)
    turn(side, 1)
    assert "97" in last_finished(side).error_message


def test_a_submission_without_a_phase_or_with_the_other_role_s_is_refused(side: Side) -> None:
    submit(side, "none")
    side.pipe.inbox[-1].router.message.submit.ClearField("local")
    submit(side, "export")
    side.pipe.inbox[-1].router.message.submit.export.decode_worker_id = "d"
    turn(side, 1)
    for name in ("none", "export"):
        (end,) = side.finished(name)
        assert end.error_code == "invalid_request"


def test_a_second_submission_of_one_attempt_is_refused_and_the_first_goes_on(side: Side) -> None:
    params = submit(side)
    submit(side)
    turn(side)
    reasons = [end.reason for end in side.finished()]
    assert reasons == [worker_pb2.FINISH_REASON_FAILED, worker_pb2.FINISH_REASON_LENGTH]
    assert side.tokens() == undisturbed(range(1, 10), params)


def test_abort_frees_everything_and_says_nothing_more(side: Side) -> None:
    submit(side)
    turn(side, 3)
    side.router(abort=worker_pb2.Abort(request_id="r", attempt=1))
    turn(side, 2)
    assert side.balanced
    assert not side.finished()


def test_abort_of_another_attempt_or_by_another_router_has_no_effect(side: Side) -> None:
    submit(side)
    turn(side, 1)
    side.router(abort=worker_pb2.Abort(request_id="r", attempt=2))
    stranger = ipc_pb2.RouterFrame(
        channel=ROUTER + 1,
        message=worker_pb2.RouterMessage(abort=worker_pb2.Abort(request_id="r", attempt=1)),
    )
    side.pipe.inbox.append(ipc_pb2.EngineCommand(router=stranger))
    turn(side)
    assert last_finished(side).reason == worker_pb2.FINISH_REASON_LENGTH


def test_when_a_router_s_stream_ends_its_requests_are_aborted(side: Side) -> None:
    submit(side)
    turn(side, 2)
    closed = ipc_pb2.ChannelClosed(channel=ROUTER, reason="gone")
    side.pipe.inbox.append(ipc_pb2.EngineCommand(closed=closed))
    turn(side, 2)
    assert side.balanced
    assert not side.finished()


def test_the_deadline_ends_a_request_that_its_router_forgot(side: Side, clock: FakeClock) -> None:
    submit(side)
    turn(side, 1)
    clock.now += 11
    turn(side, 2)
    assert last_finished(side).error_code == "deadline_exceeded"
    assert side.balanced


def test_hello_is_answered_by_description_and_snapshot(side: Side) -> None:
    submit(side)
    turn(side)
    side.router(hello=worker_pb2.RouterHello(router_id="x"))
    turn(side, 1)
    messages = [e.worker.message for e in side.pipe.sent if e.worker.channel == ROUTER]
    hello, snapshot = messages[-2:]
    assert hello.hello.role == worker_pb2.ROLE_DECODE
    assert hello.hello.transports == ["copy"]
    assert snapshot.cache.reset
    assert len(snapshot.cache.stored) == 16 * len(side.engine.cached_hashes()) > 0


def test_cache_events_are_numbered_without_gaps_and_add_up_to_a_snapshot(side: Side) -> None:
    for i in range(6):
        submit(side, f"r{i}", prompt=8 + 4 * (i % 3))
        turn(side)
    side.pipe.inbox.append(
        ipc_pb2.EngineCommand(
            call=ipc_pb2.AdminCall(id=1, flush_cache=worker_pb2.FlushCacheRequest())
        )
    )
    submit(side, "last")
    turn(side)
    known: set[bytes] = set()
    events = [e.worker.message.cache for e in side.pipe.sent if e.worker.message.HasField("cache")]
    for number, event in enumerate(events, start=1):
        assert event.seq == number
        cut = lambda data: {data[i : i + 16] for i in range(0, len(data), 16)}  # noqa: E731
        known -= cut(event.removed)
        known |= cut(event.stored)
    assert known == set(side.engine.cached_hashes())


def test_cache_events_of_the_host_tier_add_up_to_a_snapshot_too(clock: FakeClock) -> None:
    side = make_side("decode", clock=clock, pools={}, num_blocks=6, num_host_blocks=8)
    known: dict[str, set[bytes]] = {"device": set(), "host": set()}
    cut = lambda data: {data[i : i + 16] for i in range(0, len(data), 16)}  # noqa: E731
    for i in range(8):
        submit(side, f"r{i}", prompt=13, salt=i % 3)
        turn(side)
    assert side.engine.stats().host.hit_tokens > 0
    for event in (each.worker.message for each in side.pipe.sent):
        if event.HasField("cache"):
            known["device"] -= cut(event.cache.removed)
            known["device"] |= cut(event.cache.stored)
            for change in event.cache.lower:
                assert change.tier == worker_pb2.CACHE_TIER_HOST
                known["host"] -= cut(change.removed)
                known["host"] |= cut(change.stored)
    side.pipe.sent.clear()
    side.router(resync=worker_pb2.Resync())
    turn(side, 1)
    (snapshot,) = (e.worker.message.cache for e in side.pipe.sent if e.worker.channel == ROUTER)
    assert cut(snapshot.stored) == known["device"] == set(side.engine.cached_hashes())
    (host,) = snapshot.lower
    assert cut(host.stored) == known["host"] == set(side.engine.host_hashes())


def test_blocks_are_saved_while_nothing_is_computed(clock: FakeClock) -> None:
    side = make_side("decode", clock=clock, pools={}, num_blocks=6, num_host_blocks=8)
    assert side.executor.pool.host_memory is not None
    side.executor.pool.host_memory.delay = 30
    submit(side, prompt=13)
    turn(side)
    assert not side.engine.has_work
    assert side.engine.stats().host.cached_blocks == 0
    turn(side, 40)
    assert side.engine.stats().host.cached_blocks > 0


def test_drain_waits_for_what_runs_and_refuses_what_comes(side: Side) -> None:
    submit(side)
    turn(side, 1)
    drain = worker_pb2.DrainRequest(timeout_ms=60_000)
    side.pipe.inbox.append(ipc_pb2.EngineCommand(call=ipc_pb2.AdminCall(id=9, drain=drain)))
    submit(side, "late")
    turn(side, 1)
    assert side.finished("late")[0].error_code == "unavailable"
    assert not [e for e in side.pipe.sent if e.HasField("reply")]
    turn(side)
    (reply,) = [e.reply for e in side.pipe.sent if e.HasField("reply")]
    assert (reply.id, reply.drain.drained) == (9, True)
    resume = worker_pb2.DrainRequest(resume=True)
    side.pipe.inbox.append(ipc_pb2.EngineCommand(call=ipc_pb2.AdminCall(id=10, drain=resume)))
    submit(side, "after")
    turn(side)
    assert side.finished("after")[0].reason == worker_pb2.FINISH_REASON_LENGTH


def test_drain_gives_up_at_its_timeout(side: Side, clock: FakeClock) -> None:
    submit(side)
    drain = worker_pb2.DrainRequest(timeout_ms=100)
    side.pipe.inbox.append(ipc_pb2.EngineCommand(call=ipc_pb2.AdminCall(id=9, drain=drain)))
    turn(side, 1)
    clock.now += 0.2
    turn(side, 1)
    (reply,) = [e.reply for e in side.pipe.sent if e.HasField("reply")]
    assert not reply.drain.drained
    assert reply.drain.running == 1


def test_at_its_end_a_worker_hands_back_what_still_runs(side: Side) -> None:
    for name in "ab":
        submit(side, name)
    turn(side, 2)
    side.pipe.inbox.append(ipc_pb2.EngineCommand(stop=ipc_pb2.Stop()))
    side.loop.run()
    for name in "ab":
        (end,) = side.finished(name)
        assert end.reason == worker_pb2.FINISH_REASON_FAILED
        assert end.error_code in RETRYABLE
    assert side.balanced


def test_a_failing_step_fails_its_requests_and_the_loop_goes_on(side: Side) -> None:
    side.executor.fail_with = RuntimeError("device lost")
    submit(side)
    turn(side, 2)
    end = last_finished(side)
    assert end.error_code == "internal"
    assert "device lost" in end.error_message
    params = submit(side, "next")
    turn(side)
    assert side.tokens("next") == undisturbed(range(1, 10), params)
    assert side.balanced


def test_a_lost_executor_fails_its_requests_and_ends_the_loop(side: Side) -> None:
    side.executor.fail_with = ExecutorLostError("rank 1 is gone")
    submit(side)
    with pytest.raises(ExecutorLostError, match="rank 1"):
        turn(side, 3)
    assert last_finished(side).error_code == "worker_lost"


def test_heartbeats_carry_load_and_metrics(side: Side, clock: FakeClock) -> None:
    submit(side)
    turn(side, 2)
    clock.now += 2
    turn(side, 1)
    beats = [e.heartbeat for e in side.pipe.sent if e.HasField("heartbeat")]
    assert beats[-1].load.running == 1
    assert beats[-1].load.held_blocks > 0
    assert b"diptych_kv_blocks" in beats[-1].metrics
    assert len(beats) == 2
