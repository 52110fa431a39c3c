"""What is particular to a step that is planned while the step before it is in flight."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import pytest

from core.finish import FinishReason
from engine.engine import Engine
from engine.plan import PENDING, StepPlan
from engine.request import SequenceOutput
from tests.support.engine import clock_of, make_engine, make_request, run, step_until_preempted
from tests.support.fake_executor import EOS, FakeExecutor, FakeStep, undisturbed


def ahead_engine(**settings: object) -> tuple[Engine, FakeExecutor]:
    """An engine whose executor takes a step while another one is in flight."""
    return make_engine(overlaps=True, **settings)  # type: ignore[arg-type]


def prompt_where(holds: Callable[[Sequence[int]], bool], **sampling: object) -> list[int]:
    """A prompt of three tokens whose output is as wanted."""
    params = make_request(**sampling).sampling  # type: ignore[arg-type]
    for middle in range(1, 90):
        for last in range(1, 90):
            if holds(undisturbed([5, middle, last], params)):
                return [5, middle, last]
    raise AssertionError("no such prompt")


def ends_by_itself(at: int) -> list[int]:
    """A prompt whose output ends with EOS at that index."""
    sampling = {"max_tokens": at + 2, "ignore_eos": False}
    return prompt_where(lambda output: len(output) == at + 1 and output[at] == EOS, **sampling)


def tokens_of(plan: StepPlan, request_id: str) -> list[int] | None:
    """What a plan computes of a request."""
    for chunk in plan.chunks:
        if chunk.request_id == request_id:
            return list(chunk.token_ids)
    return None


def ends(outputs: Sequence[SequenceOutput]) -> dict[str, FinishReason | None]:
    return {output.request_id: output.finish_reason for output in outputs}


def test_first_step_starts_two_and_each_later_one_starts_one_more() -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", 6, max_tokens=6))
    for planned in (2, 3, 4):
        (output,) = engine.step().outputs
        assert len(output.token_ids) == 1
        assert (len(executor.plans), len(executor.in_flight)) == (planned, 1)


def test_next_step_is_started_before_the_one_in_flight_is_waited_for() -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", 6, max_tokens=6))
    engine.step()
    at_wait = []
    finish = executor.finish

    def look(step: FakeStep) -> object:
        at_wait.append(len(executor.in_flight))
        return finish(step)

    executor.finish = look  # type: ignore[method-assign,assignment]
    engine.step()
    assert at_wait == [2]


def test_token_in_flight_is_pending_and_its_place_is_counted() -> None:
    engine, executor = ahead_engine(max_chunk_tokens=4)
    engine.add(make_request("r", 6, max_tokens=4, min_tokens=2, ignore_eos=False))
    run(engine)
    planned = [plan.chunks[0] for plan in executor.plans[:5]]
    assert [(chunk.start, len(chunk.token_ids)) for chunk in planned] == [
        (0, 4), (4, 2), (6, 1), (7, 1), (8, 1),
    ]  # fmt: skip
    assert [list(chunk.token_ids) == [PENDING] for chunk in planned] == [False] * 2 + [True] * 3
    specs = [chunk.sample for chunk in planned if chunk.sample is not None]
    assert [spec.position for spec in specs] == [0, 1, 2, 3]
    assert [tuple(spec.banned_ids) for spec in specs] == [(EOS,), (EOS,), (), ()]


@pytest.mark.parametrize(
    "request_",
    [
        make_request("r", 6, max_tokens=1),
        make_request("r", 6, prefill_only=True),
        make_request("r", 39, max_tokens=9),
    ],
)
def test_nothing_is_planned_after_a_token_that_is_the_last_whatever_it_is(
    request_: object,
) -> None:
    engine, executor = ahead_engine(max_len=40, max_step_tokens=64)
    engine.add(request_)  # type: ignore[arg-type]
    (output,) = engine.step().outputs
    assert output.finish_reason is not None
    assert len(executor.plans) == 1


def test_end_that_nobody_foresaw_drops_what_the_next_step_computes() -> None:
    engine, executor = ahead_engine()
    prompt = ends_by_itself(1)
    engine.add(make_request("stops", prompt, max_tokens=9, ignore_eos=False))
    engine.add(make_request("goes-on", [9] * 6, max_tokens=9))
    outputs = [engine.step().outputs for _ in range(3)]
    assert ends(outputs[1]) == {"stops": FinishReason.STOP, "goes-on": None}
    assert tokens_of(executor.plans[2], "stops") == [PENDING], "it was planned too early"
    assert list(ends(outputs[2])) == ["goes-on"]
    assert run(engine).tokens["goes-on"] == undisturbed(
        [9] * 6, make_request(max_tokens=9).sampling
    )[3:]  # fmt: skip
    assert engine.stats().held_blocks == 0


def test_blocks_of_an_ended_request_are_free_when_the_step_in_flight_is_over() -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", ends_by_itself(1), max_tokens=9, ignore_eos=False))
    engine.step()
    (output,) = engine.step().outputs
    assert output.finish_reason is FinishReason.STOP
    assert len(executor.in_flight) == 1
    table = list(engine.block_table("r"))
    engine.reap()
    with pytest.raises(KeyError):
        engine.block_table("r")
    assert engine.stats().held_blocks == len(table)
    engine.settle()
    assert engine.stats().held_blocks == 0
    assert not engine.has_work


def test_stop_id_is_named_though_a_step_follows() -> None:
    def sevens(output: Sequence[int]) -> bool:
        return len(output) == 2 and output[1] == 7

    prompt = prompt_where(sevens, max_tokens=4, stop_token_ids=(7,))
    engine, _ = ahead_engine()
    engine.add(make_request("r", prompt, max_tokens=9, stop_token_ids=(7,)))
    assert run(engine).ends["r"].matched_stop == 7


def test_reservations_do_not_get_blocks_that_a_step_in_flight_writes() -> None:
    engine, _ = ahead_engine(num_blocks=4, prefix_caching=False)
    engine.add(make_request("r", 8, max_tokens=8))
    engine.step()
    engine.abort("r")
    assert engine.reserve(make_request("import", 12)) is None
    engine.settle()
    assert engine.reserve(make_request("import", 12)) is not None


def test_id_of_an_aborted_request_can_be_used_while_its_last_step_is_in_flight() -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", 6, max_tokens=8))
    engine.step()
    engine.abort("r")
    again = make_request("r", [9] * 5, max_tokens=5)
    engine.add(again)
    assert len(executor.in_flight) == 1
    assert run(engine).tokens["r"] == undisturbed(again.prompt_ids, again.sampling)
    assert engine.stats().held_blocks == 0


def test_aborted_request_says_nothing_more() -> None:
    engine, _ = ahead_engine()
    engine.add(make_request("r", 6, max_tokens=8))
    engine.add(make_request("other", [9] * 6, max_tokens=3))
    engine.step()
    engine.abort("r")
    assert list(ends(engine.step().outputs)) == ["other"]
    assert list(run(engine).ends) == ["other"]


def test_penalties_wait_for_the_token_and_only_while_they_must() -> None:
    engine, executor = ahead_engine(num_blocks=32)
    engine.add(make_request("plain", [9] * 6, max_tokens=12))
    engine.add(make_request("penalised", 6, max_tokens=3, frequency_penalty=0.5))
    for in_flight in (0, 0, 1):
        engine.step()
        assert len(executor.in_flight) == in_flight
    assert run(engine).ends["plain"].finish_reason is FinishReason.LENGTH
    pending = [PENDING in (tokens_of(plan, "plain") or ()) for plan in executor.plans]
    assert pending == [False] * 3 + [True] * 9, "once its last token is in flight, no more waiting"


def test_preemption_waits_for_the_step_in_flight() -> None:
    engine, executor = ahead_engine(num_blocks=6)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    preempted_with = []
    submit = executor.submit

    def look(plan: StepPlan) -> object:
        if engine.stats().preemptions and not preempted_with:
            preempted_with.append(len(executor.in_flight))
        return submit(plan)

    executor.submit = look  # type: ignore[method-assign,assignment]
    transcript = run(engine)
    assert preempted_with == [0]
    for name, prompt in (("old", make_request("", 8).prompt_ids), ("young", [9] * 8)):
        assert transcript.tokens[name] == undisturbed(prompt, make_request(max_tokens=12).sampling)


def test_tables_stay_whole_from_the_return_of_a_step_to_the_next() -> None:
    engine, _ = ahead_engine(num_blocks=6)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    while engine.has_work:
        for output in engine.step().outputs:
            table = engine.block_table(output.request_id)
            assert len(table) * 4 >= engine.num_computed(output.request_id) == output.num_computed


def test_admission_counts_the_block_that_a_pending_token_needs() -> None:
    engine, executor = ahead_engine(num_blocks=6)
    engine.add(make_request("running", 8, max_tokens=9))
    submit = executor.submit

    def join(plan: StepPlan) -> object:
        executor.submit = submit  # type: ignore[method-assign]
        engine.add(make_request("joins", [9] * 12, max_tokens=1))
        return submit(plan)

    executor.submit = join  # type: ignore[method-assign,assignment]
    engine.step()
    assert engine.stats().waiting == 1, "6 blocks: 2 held, 1 for the token, 3 wanted, 1 must stay"


def test_prefix_is_matched_only_when_it_has_been_computed() -> None:
    engine, executor = ahead_engine(num_blocks=32)
    engine.add(make_request("first", 12, max_tokens=4))
    executor.run_device()
    engine.step()
    known = len(engine.cached_hashes())
    assert known == 3
    engine.add(make_request("next", [*make_request("", 12).prompt_ids, 7, 7], max_tokens=2))
    engine.add(make_request("twin", [9] * 9, max_tokens=2))
    engine.step()
    assert len(engine.cached_hashes()) == known, "the step that computes them is in flight"
    engine.step()
    assert len(engine.cached_hashes()) > known


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What was logged of failures."""
    caplog.set_level(logging.ERROR)
    return caplog


def test_step_that_can_not_be_started_fails_after_the_older_one(
    quiet: pytest.LogCaptureFixture,
) -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", 6, max_tokens=8))
    engine.step()
    executor.fail_with = RuntimeError("no launch")
    (older,) = engine.step().outputs
    assert (older.finish_reason, len(older.token_ids)) == (None, 1)
    planned = len(executor.plans)
    (failed,) = engine.step().outputs
    assert failed.finish_reason is FinishReason.FAILED
    assert failed.error is not None and "no launch" in failed.error.message
    assert len(executor.plans) == planned, "nothing is planned on a step that never started"
    assert engine.step().outputs == []
    assert engine.stats().held_blocks == 0
    assert len(quiet.records) == 1


def test_failed_step_takes_only_its_own_and_the_next_one_goes_on(
    quiet: pytest.LogCaptureFixture,
) -> None:
    engine, executor = ahead_engine(max_num_seqs=4)
    engine.add(make_request("fails", 6, max_tokens=8))
    executor.fail_with, executor.fail_at = RuntimeError("device lost"), "wait"
    submit = executor.submit

    def join(plan: StepPlan) -> object:
        executor.submit = submit  # type: ignore[method-assign]
        engine.add(make_request("joins", [9] * 5, max_tokens=4))
        return submit(plan)

    executor.submit = join  # type: ignore[method-assign,assignment]
    (failed,) = engine.step().outputs
    assert (failed.request_id, failed.finish_reason) == ("fails", FinishReason.FAILED)
    assert tokens_of(executor.plans[1], "fails") == [PENDING]
    transcript = run(engine)
    assert transcript.tokens == {"joins": undisturbed([9] * 5, make_request(max_tokens=4).sampling)}
    assert len(quiet.records) == 1
    assert engine.stats().held_blocks == 0


def test_failure_of_a_step_whose_sequences_have_all_ended_is_logged_and_told_to_nobody(
    quiet: pytest.LogCaptureFixture,
) -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", ends_by_itself(1), max_tokens=9, ignore_eos=False))
    engine.step()
    executor.fail_with, executor.fail_at = RuntimeError("too late"), "wait"
    (output,) = engine.step().outputs
    assert output.finish_reason is FinishReason.STOP
    assert engine.step().outputs == []
    assert [record.levelname for record in quiet.records] == ["ERROR"]
    assert not engine.has_work


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("fail_at", ["submit", "wait"])
def test_interrupted_engine_can_be_settled(fail_at: Literal["submit", "wait"]) -> None:
    engine, executor = ahead_engine()
    engine.add(make_request("r", 6, max_tokens=8))
    engine.step()
    executor.fail_with, executor.fail_at = KeyboardInterrupt(), fail_at
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            engine.step()
    engine.check_integrity()
    engine.abort("r")
    assert [done.outputs for done in engine.settle()] == [[], []]
    assert engine.stats().held_blocks == 0
    assert not engine.has_work


def test_settle_returns_what_was_in_flight_and_starts_nothing() -> None:
    engine, executor = ahead_engine()
    request = make_request("r", 6, max_tokens=8)
    engine.add(request)
    (first,) = engine.step().outputs
    planned = len(executor.plans)
    ((second,),) = (done.outputs for done in engine.settle())
    assert [*first.token_ids, *second.token_ids] == undisturbed(
        request.prompt_ids, request.sampling
    )[:2]  # fmt: skip
    assert len(executor.plans) == planned
    assert engine.settle() == []


def test_duration_is_the_time_that_the_device_gave_to_the_step() -> None:
    engine, executor = ahead_engine()
    clock = clock_of(engine)
    finish = executor.finish

    def slow(step: FakeStep) -> object:
        clock.now += 0.5
        return finish(step)

    executor.finish = slow  # type: ignore[method-assign,assignment]
    engine.add(make_request("a", 16, max_tokens=4))
    steps = [engine.step()]
    clock.now += 2.0  # the caller takes its time while a step is in flight
    steps.append(engine.step())
    assert [done.duration_s for done in steps] == pytest.approx([0.5, 2.5])
    assert [(done.num_prefill_tokens, done.num_decode_tokens) for done in steps] == [
        (16, 0), (0, 1),
    ]  # fmt: skip
    run(engine)
    clock.now += 60.0
    engine.add(make_request("b", [9] * 16, max_tokens=1))
    assert engine.step().duration_s == pytest.approx(0.5), "idle time is nobody's"


def test_handover_works_while_steps_of_others_are_in_flight() -> None:
    sampling = {"max_tokens": 9, "seed": 5}
    engine, executor = ahead_engine(num_blocks=32)
    engine.add(make_request("other", [9] * 6, max_tokens=30))
    engine.step()
    engine.add(make_request("export", 10, prefill_only=True, **sampling))
    while True:
        done = {output.request_id: output for output in engine.step().outputs}
        if "export" in done and done["export"].finish_reason is not None:
            break
    assert executor.in_flight, "this test is about steps in flight"
    blocks = list(engine.block_table("export"))
    engine.hold(blocks)
    engine.step()
    expected = undisturbed(
        make_request("", 10).prompt_ids, make_request("", 10, **sampling).sampling
    )
    engine.flush_cache()
    reservation = engine.reserve(make_request("import", 10, **sampling))
    assert reservation is not None and executor.in_flight
    for theirs, ours in zip(blocks, reservation.block_table, strict=True):
        executor.pool.blocks[ours][:] = executor.pool.blocks[theirs]
    engine.release(blocks)
    engine.adopt(reservation, expected[0])
    spare = engine.reserve(make_request("spare", [3] * 9))
    assert spare is not None
    engine.step()
    engine.cancel(spare)
    transcript = run(engine)
    assert transcript.tokens["import"] == expected[1:]
    assert engine.stats().held_blocks == 0


def test_preempted_request_comes_back_and_is_planned_ahead_again() -> None:
    engine, executor = ahead_engine(num_blocks=6)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    step_until_preempted(engine)
    planned = len(executor.plans)
    run(engine)
    again = [tokens_of(plan, "young") for plan in executor.plans[planned:]]
    assert [PENDING] in again
