"""Sequences under a grammar in the engine, one step at a time and planned ahead."""

from dataclasses import replace

import pytest

from core.errors import ErrorCode, InvalidRequestError, OverloadedError
from core.finish import FinishReason
from engine.engine import Engine
from engine.grammar import budget
from engine.grammar.compiler import COMPILE_TIMEOUT_S, MAX_QUEUED
from engine.plan import PENDING
from engine.request import EngineRequest, SequenceOutput
from tests.support.engine import FakeClock, MakeEngine, make_engine, make_request, run
from tests.support.fake_executor import EOS, kv_of, undisturbed
from tests.support.grammar import BAD, HeldCompiler, ready_compiler, structure


def expected(request: EngineRequest) -> list[int]:
    return undisturbed(request.prompt_ids, request.sampling)


def steps(engine: Engine, count: int) -> dict[str, list[SequenceOutput]]:
    said: dict[str, list[SequenceOutput]] = {}
    for _ in range(count):
        if engine.has_work:
            for output in engine.step().outputs:
                said.setdefault(output.request_id, []).append(output)
    return said


def test_outputs_follow_their_rules_beside_others_and_through_preemption(
    make_engine: MakeEngine,
) -> None:
    lengths = (1, 7, 12, 20)
    grammars = ready_compiler(*map(structure, lengths))
    engine, _ = make_engine(num_blocks=11, grammars=grammars)
    requests = [
        make_request(f"g{n}", n, max_tokens=16, seed=n, structured=structure(n)) for n in lengths
    ] + [make_request("plain", 5, max_tokens=9), make_request("other", 3, max_tokens=14)]
    for request in requests:
        engine.add(request)
    done = run(engine)
    assert engine.stats().preemptions
    for request in requests:
        assert done.tokens[request.request_id] == expected(request), request.request_id
    assert done.tokens["g7"][-1] == EOS
    assert done.ends["g20"].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_a_grammar_holds_up_nobody_when_steps_are_planned_ahead() -> None:
    engine, executor = make_engine(overlaps=True, grammars=ready_compiler(structure(30)))
    engine.add(make_request("g", 3, max_tokens=9, min_tokens=9, structured=structure(30)))
    engine.add(make_request("plain", 3, max_tokens=9))
    run(engine)
    planned = [{c.request_id: list(c.token_ids) for c in plan.chunks} for plan in executor.plans]
    assert planned[1:] == [{"g": [PENDING], "plain": [PENDING]}] * 8


def test_min_tokens_keeps_the_end_away_unless_nothing_else_is_allowed(
    make_engine: MakeEngine,
) -> None:
    engine, _ = make_engine(grammars=ready_compiler(structure(6), structure(30)))
    early = make_request("early", 3, max_tokens=20, structured=structure(6), min_tokens=12)
    late = make_request("late", 3, max_tokens=40, structured=structure(30), min_tokens=28)
    for request in (early, late):
        engine.add(request)
    done = run(engine)
    assert len(done.tokens["early"]) == 7 and done.tokens["early"][-1] == EOS
    assert 29 <= len(done.tokens["late"]) <= 31
    assert done.tokens["late"] == expected(late)


def test_who_waits_for_a_grammar_lets_others_pass(make_engine: MakeEngine) -> None:
    grammars = HeldCompiler()
    engine, _ = make_engine(grammars=grammars, max_num_seqs=2)
    waits = [make_request(f"w{i}", 5, structured=structure(4)) for i in range(3)]
    for request in waits:
        engine.add(request)
    engine.add(make_request("plain", 5))
    said = steps(engine, 30)
    assert said.keys() == {"plain"} and said["plain"][-1].finish_reason is FinishReason.LENGTH
    assert not engine.has_work and engine.waits_for_grammar
    grammars.release()
    assert engine.has_work
    done = run(engine)
    assert [done.tokens[request.request_id] for request in waits] == list(map(expected, waits))
    assert grammars.backend.compiled == [structure(4)]


def test_who_waits_can_be_taken_back(make_engine: MakeEngine) -> None:
    grammars = HeldCompiler()
    engine, _ = make_engine(grammars=grammars)
    engine.add(make_request("r", 5, structured=structure(4)))
    assert engine.abort("r")
    grammars.release()
    assert not engine.has_work and not engine.waits_for_grammar
    engine.add(make_request("r", 5, structured=structure(4)))
    assert run(engine).tokens["r"]


def test_a_definition_that_cannot_be_ends_its_request_alone(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(grammars=ready_compiler(BAD))
    engine.add(make_request("bad", 5, structured=BAD))
    engine.add(make_request("plain", 5))
    done = run(engine)
    end = done.ends["bad"]
    assert end.finish_reason is FinishReason.FAILED and not done.tokens["bad"]
    assert end.error is not None and end.error.code is ErrorCode.INVALID_REQUEST
    assert "no such rule" in end.error.message
    assert done.tokens["plain"] == expected(make_request("plain", 5))


def test_a_bug_in_the_library_ends_its_request_alone(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(grammars=(grammars := HeldCompiler()))
    engine.add(make_request("bug", 5, structured=replace(BAD, definition="broken")))
    engine.add(make_request("plain", 5))
    grammars.release()
    done = run(engine)
    error = done.ends["bug"].error
    assert error is not None and error.code is ErrorCode.INTERNAL and "a bug" in error.message
    assert done.ends["plain"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_grammar_that_gives_up_ends_its_request_alone(
    make_engine: MakeEngine, fails_at: int
) -> None:
    rule = structure(30, fails_at=fails_at)
    engine, _ = make_engine(grammars=ready_compiler(rule))
    failing = make_request("g", 5, max_tokens=30, min_tokens=20, structured=rule)
    engine.add(failing)
    engine.add(make_request("plain", 5))
    done = run(engine)
    error = done.ends["g"].error
    assert error is not None and "too complex" in error.message
    assert done.tokens["g"] == expected(failing)[:fails_at]
    assert done.tokens["plain"] == expected(make_request("plain", 5))


def test_a_grammar_whose_masks_take_too_long_ends_its_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MEAN_S", 0.0)
    monkeypatch.setattr(budget, "SPARE_S", 0.0)
    rule = structure(30)
    engine, _ = make_engine(grammars=ready_compiler(rule))
    engine.add(make_request("g", 5, max_tokens=30, structured=rule))
    engine.add(make_request("plain", 5))
    done = run(engine)
    error = done.ends["g"].error
    assert error is not None and error.code is ErrorCode.INVALID_REQUEST
    assert "takes too long to follow" in error.message and not done.tokens["g"]
    assert done.tokens["plain"] == expected(make_request("plain", 5))


def test_a_definition_that_takes_too_long_is_refused(make_engine: MakeEngine) -> None:
    clock = FakeClock()
    grammars = HeldCompiler(clock=clock)
    engine, _ = make_engine(grammars=grammars)
    engine.add(make_request("r", 5, structured=structure(4)))
    assert not engine.step().outputs and not engine.has_work
    clock.now += COMPILE_TIMEOUT_S
    assert engine.has_work
    (end,) = engine.step().outputs
    assert isinstance(end.error, OverloadedError)  # no thread ever looked at it
    assert not engine.waits_for_grammar


def test_no_more_definitions_wait_than_there_is_room_for(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(grammars=HeldCompiler())
    for i in range(MAX_QUEUED):
        engine.add(make_request(f"r{i}", 5, structured=structure(i)))
    with pytest.raises(OverloadedError, match="wait to be compiled"):
        engine.add(make_request("more", 5, structured=structure(MAX_QUEUED)))
    engine.add(make_request("same", 5, structured=structure(0)))


def test_without_grammars_the_answer_is_clear(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidRequestError, match="no structured output"):
        engine.add(make_request("r", 5, structured=structure(4)))
    with pytest.raises(InvalidRequestError, match="no structured output"):
        engine.reserve(make_request("r", 5, structured=structure(4)))


@pytest.mark.parametrize("done", [0, 3])
def test_the_hand_over_goes_on_where_prefill_stopped(make_engine: MakeEngine, done: int) -> None:
    request = make_request("r", 10, max_tokens=12, structured=structure(11), min_tokens=9)
    whole = expected(request)
    request = replace(request, output_ids=whole[:done])
    prefill, _ = make_engine(grammars=ready_compiler(structure(11)))
    prefill.add(replace(request, prefill_only=True))
    assert run(prefill).tokens["r"] == whole[done : done + 1]

    grammars = HeldCompiler()
    decode, executor = make_engine(grammars=grammars)
    reservation = decode.reserve(request)
    assert reservation is not None
    kv = kv_of([*request.prompt_ids, *request.output_ids])
    for position, value in enumerate(kv):
        executor.pool.blocks[reservation.block_table[position // 4]][position % 4] = value
    decode.adopt(reservation, whole[done])
    assert not steps(decode, 3)  # its grammar is not there yet
    grammars.release()
    assert run(decode).tokens["r"] == whole[done + 1 :]


def test_an_adopted_sequence_ends_if_its_definition_cannot_be(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(grammars=ready_compiler(BAD))
    reservation = engine.reserve(make_request("r", 5, structured=BAD))
    assert reservation is not None
    engine.adopt(reservation, 3)
    (output,) = engine.step().outputs
    assert output.finish_reason is FinishReason.FAILED
    engine.step()
    assert engine.stats().held_blocks == 0


def test_an_output_that_broke_the_rules_elsewhere_is_not_continued(
    make_engine: MakeEngine,
) -> None:
    engine, _ = make_engine(grammars=ready_compiler(structure(9)))
    whole = expected(make_request("r", 5, structured=structure(9)))
    wrong = [whole[0] % 96 + 1]
    engine.add(make_request("r", 5, structured=structure(9), output_ids=wrong))
    (end,) = run(engine).ends.values()
    assert end.error is not None and "can't go on" in end.error.message


@pytest.mark.parametrize("fail_at", ["submit", "wait"])
def test_a_failed_step_ends_what_was_planned_after_it(fail_at: str) -> None:
    engine, executor = make_engine(overlaps=True, grammars=ready_compiler(structure(9)))
    engine.add(make_request("g", 5, max_tokens=9, min_tokens=9, structured=structure(9)))
    engine.step()
    executor.fail_with, executor.fail_at = RuntimeError("out of luck"), fail_at  # type: ignore[assignment]
    done = run(engine)
    error = done.ends["g"].error
    assert error is not None and "out of luck" in error.message
    engine.add(make_request("h", 5, structured=structure(9)))
    assert run(engine).tokens["h"] == expected(make_request("h", 5, structured=structure(9)))
