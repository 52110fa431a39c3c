import logging
from dataclasses import replace

import pytest

from core.block_hash import hash_blocks, root_hash
from core.errors import (
    DiptychError,
    ErrorCode,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from core.finish import FinishReason
from engine.plan import StepResult
from tests.support.engine import MakeEngine, clock_of, make_request, run, step_until_preempted
from tests.support.fake_executor import DIGEST, EOS, VOCAB_SIZE, FakeStep, undisturbed


def prompt_that_samples(token_id: int, at: int, **sampling: object) -> list[int]:
    """A prompt whose output has `token_id` at index `at` and not before."""
    params = make_request(**{"max_tokens": at + 1, "ignore_eos": True, **sampling}).sampling
    for last in range(1, VOCAB_SIZE):
        for middle in range(1, VOCAB_SIZE):
            output = undisturbed([5, middle, last], params)
            if len(output) == at + 1 and output[at] == token_id and token_id not in output[:at]:
                return [5, middle, last]
    raise AssertionError("no such prompt")


def test_tokens_are_the_undisturbed_ones_alone_and_in_a_batch(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=64)
    requests = [make_request(f"r{i}", [i + 1] * (3 * i + 1), seed=i) for i in range(6)]
    for request in requests:
        engine.add(request)
    transcript = run(engine)
    for request in requests:
        expected = undisturbed(request.prompt_ids, request.sampling)
        assert transcript.tokens[request.request_id] == expected


def test_output_reports_progress_index_and_logprobs(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_chunk_tokens=5)
    engine.add(make_request("r", 8, max_tokens=2, logprobs=0))
    first, second, third = (engine.step().outputs[0] for _ in range(3))
    assert (first.token_ids, first.num_computed, first.logprobs) == ((), 5, ())
    assert (second.first_index, second.num_computed, len(second.logprobs)) == (0, 8, 1)
    assert (third.first_index, third.num_computed, third.finish_reason) == (
        1,
        9,
        FinishReason.LENGTH,
    )


def test_end_of_sequence_stops_unless_ignored(make_engine: MakeEngine) -> None:
    prompt = prompt_that_samples(EOS, 2)
    engine, _ = make_engine()
    engine.add(make_request("stops", prompt, max_tokens=6, ignore_eos=False))
    engine.add(make_request("goes-on", prompt, max_tokens=6, ignore_eos=True))
    transcript = run(engine)
    assert len(transcript.tokens["stops"]) == 3
    assert transcript.ends["stops"].finish_reason is FinishReason.STOP
    assert transcript.ends["stops"].matched_stop is None
    assert len(transcript.tokens["goes-on"]) == 6


def test_stop_id_stops_and_is_named(make_engine: MakeEngine) -> None:
    prompt = prompt_that_samples(7, 1, stop_token_ids=(7,))
    engine, _ = make_engine()
    engine.add(make_request("r", prompt, stop_token_ids=(7, 9)))
    transcript = run(engine)
    assert transcript.tokens["r"][-1] == 7
    assert transcript.ends["r"].finish_reason is FinishReason.STOP
    assert transcript.ends["r"].matched_stop == 7


def test_stop_on_the_last_allowed_token_is_a_stop(make_engine: MakeEngine) -> None:
    prompt = prompt_that_samples(7, 1, stop_token_ids=(7,))
    engine, _ = make_engine()
    engine.add(make_request("r", prompt, max_tokens=2, stop_token_ids=(7,)))
    assert run(engine).ends["r"].finish_reason is FinishReason.STOP


def test_stop_ids_are_banned_before_min_tokens(make_engine: MakeEngine) -> None:
    prompt = prompt_that_samples(7, 1, stop_token_ids=(7,))
    engine, executor = make_engine()
    engine.add(make_request("r", prompt, stop_token_ids=(7,), min_tokens=3, ignore_eos=False))
    run(engine)
    specs = [chunk.sample for plan in executor.plans for chunk in plan.chunks]
    banned = [spec.banned_ids for spec in specs if spec is not None]
    assert [set(ids) for ids in banned[:4]] == [{EOS, 7}] * 3 + [set()]


def test_context_length_ends_with_length(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_len=12)
    engine.add(make_request("r", 8, max_tokens=100))
    transcript = run(engine)
    assert len(transcript.tokens["r"]) == 4
    assert transcript.ends["r"].finish_reason is FinishReason.LENGTH


def test_pool_smaller_than_the_context_bounds_the_length(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=3, block_size=4)
    assert engine.max_model_len == 12
    engine.add(make_request("r", 8, max_tokens=100))
    assert len(run(engine).tokens["r"]) == 4


def test_resubmitted_request_goes_on_where_it_was(make_engine: MakeEngine) -> None:
    whole = make_request("whole", 6, max_tokens=8, seed=3)
    expected = undisturbed(whole.prompt_ids, whole.sampling)
    engine, executor = make_engine()
    engine.add(replace(whole, request_id="again", output_ids=expected[:5]))
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    assert [token for output in outputs for token in output.token_ids] == expected[5:]
    assert outputs[0].first_index == 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    first = executor.plans[0].chunks[0]
    assert list(first.token_ids) == [*whole.prompt_ids, *expected[:5]]
    assert first.sample is not None and list(first.sample.prompt_ids) == list(whole.prompt_ids)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (make_request(prompt_ids=[]), ErrorCode.INVALID_REQUEST, "at least one"),
        (make_request(prompt_ids=40), ErrorCode.CONTEXT_LENGTH, "40 tokens and the model takes 40"),
        (make_request(prompt_ids=[1, VOCAB_SIZE]), ErrorCode.INVALID_REQUEST, f"{VOCAB_SIZE}"),
        (make_request(prompt_ids=[-1]), ErrorCode.INVALID_REQUEST, "token id -1"),
        (make_request(stop_token_ids=(500,)), ErrorCode.INVALID_REQUEST, "stop_token_ids"),
        (make_request(logit_bias={500: 1.0}), ErrorCode.INVALID_REQUEST, "logit_bias"),
        (make_request(output_ids=[1] * 8), ErrorCode.INVALID_REQUEST, "max_tokens"),
        (make_request(block_hashes=[b"x"]), ErrorCode.INVALID_REQUEST, "fill 2 blocks"),
    ],
)
def test_impossible_request_is_refused_with_a_reason(
    make_engine: MakeEngine, request_: object, code: ErrorCode, words: str
) -> None:
    engine, _ = make_engine(max_len=40)
    for submit in (engine.add, engine.check, engine.reserve):
        with pytest.raises(InvalidRequestError, match=words) as caught:
            submit(request_)
        assert caught.value.code is code
    assert not engine.has_work


def test_prompt_beyond_the_pool_is_refused_with_both_numbers(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=3, block_size=4)
    with pytest.raises(InvalidRequestError, match=r"13 tokens .* holds 12 \(3 blocks of 4\)"):
        engine.add(make_request(prompt_ids=13))


def test_id_in_use_is_refused_and_usable_again_after_the_end(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    engine.add(make_request("r", max_tokens=1))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(make_request("r"))
    run(engine)
    engine.add(make_request("r"))


def test_full_queue_is_overloaded_and_predicts_the_wait(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_waiting=2)
    engine.add(make_request("a"))
    engine.add(make_request("b"))
    with pytest.raises(OverloadedError, match="max_waiting is 2") as caught:
        engine.add(make_request("c"))
    assert caught.value.retry_after_s >= 1
    assert not engine.abort("c")
    engine.step()
    engine.add(make_request("c"))


def test_check_takes_nothing(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    engine.check(make_request("r"))
    assert not engine.has_work
    engine.add(make_request("r"))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_abort_ends_a_request_and_frees_everything(
    make_engine: MakeEngine, overlaps: bool, steps: int
) -> None:
    engine, _ = make_engine(max_chunk_tokens=5)
    engine.add(make_request("r", 8, max_tokens=20))
    for _ in range(steps):
        engine.step()
    assert engine.abort("r")
    assert not engine.abort("r")
    in_flight = overlaps and steps > 0
    assert engine.has_work == in_flight == bool(engine.stats().held_blocks)
    assert [done.outputs for done in engine.settle()] == [[]] * in_flight
    stats = engine.stats()
    assert (stats.held_blocks, stats.running, stats.waiting) == (0, 0, 0)
    assert not engine.has_work


def test_ended_request_keeps_its_blocks_until_reaped(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    engine.add(make_request("r", 8, max_tokens=1))
    engine.step()
    assert len(engine.block_table("r")) == 2
    assert engine.num_computed("r") == 8
    assert not engine.abort("r")
    assert engine.has_work
    engine.reap()
    assert engine.stats().held_blocks == 0
    with pytest.raises(KeyError):
        engine.block_table("r")


def test_failing_step_fails_only_its_requests(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine, executor = make_engine(max_num_seqs=2)
    for index, name in enumerate("abc"):
        engine.add(make_request(name, [index + 1] * 5, max_tokens=3))
    executor.fail_with = MemoryError("no room on the device")
    with caplog.at_level(logging.CRITICAL):
        failed = engine.step().outputs
    assert {output.request_id for output in failed} == {"a", "b"}
    assert {output.finish_reason for output in failed} == {FinishReason.FAILED}
    assert failed[0].error is not None
    assert failed[0].error.code is ErrorCode.INTERNAL
    assert "MemoryError: no room" in failed[0].error.message
    engine.check_integrity()
    transcript = run(engine)
    assert transcript.tokens["c"] == undisturbed([3] * 5, make_request(max_tokens=3).sampling)
    assert engine.stats().held_blocks == 0


def test_failed_step_caches_nothing_it_computed(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    engine.add(make_request("r", 8))
    executor.fail_with = UnavailableError("device lost")
    (output,) = engine.step().outputs
    assert isinstance(output.error, DiptychError)
    assert output.error.code is ErrorCode.UNAVAILABLE
    assert engine.cached_hashes() == []


def test_second_request_computes_only_what_is_not_cached(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    engine.add(make_request("a", 10, max_tokens=1))
    first = run(engine)
    engine.add(make_request("b", 10, max_tokens=1))
    transcript = run(engine)
    assert executor.plans[-1].chunks[0].start == 8
    assert transcript.tokens["b"] == first.tokens["a"]
    assert transcript.ends["b"].num_cached_tokens == 8
    stats = engine.stats()
    assert (stats.cached_tokens, stats.lookup_tokens) == (8, 20)


def test_wholly_cached_prompt_leaves_a_token_to_compute(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    for name in "ab":
        engine.add(make_request(name, 8, max_tokens=1))
        transcript = run(engine)
    assert executor.plans[-1].chunks[0].start == 4
    assert transcript.ends["b"].num_cached_tokens == 4


def test_generated_blocks_are_cached_for_the_next_turn(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    request = make_request("first-turn", 6, max_tokens=7)
    engine.add(request)
    answer = run(engine).tokens["first-turn"]
    engine.add(make_request("next-turn", [*request.prompt_ids, *answer, 11, 12], max_tokens=1))
    run(engine)
    assert executor.plans[-1].chunks[0].start == 12


def test_prefix_caching_can_be_switched_off(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(prefix_caching=False)
    for name in "ab":
        engine.add(make_request(name, 9, max_tokens=1))
        run(engine)
    assert executor.plans[-1].chunks[0].start == 0
    assert engine.cached_hashes() == []
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_given_hashes_are_used_and_extended(make_engine: MakeEngine) -> None:
    salted = root_hash(DIGEST, salt="tenant")
    engine, _ = make_engine()
    request = make_request("r", 6, max_tokens=7)
    hashes = hash_blocks(request.prompt_ids, 4, salted)
    engine.add(replace(request, block_hashes=hashes))
    answer = run(engine).tokens["r"]
    tokens = [*request.prompt_ids, *answer][:12]
    assert set(engine.cached_hashes()) == set(hash_blocks(tokens, 4, salted))


def test_chain_without_a_known_start_is_never_cached(make_engine: MakeEngine) -> None:
    """The router's hashes may be salted; guessing the start would share blocks between tenants."""
    engine, _ = make_engine()
    engine.add(make_request("r", 3, max_tokens=9, block_hashes=[]))
    run(engine)
    assert engine.cached_hashes() == []


def test_flush_forgets_what_nothing_holds(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    engine.add(make_request("done", 8, max_tokens=1))
    run(engine)
    engine.add(make_request("running", [9] * 8, max_tokens=9))
    engine.step()
    engine.drain_cache_changes()
    assert engine.flush_cache() == 2
    change = engine.drain_cache_changes()
    assert (len(change.stored), len(change.removed)) == (0, 2)
    assert len(engine.cached_hashes()) == 2
    engine.add(make_request("again", 8, max_tokens=1))
    run(engine)
    assert any(chunk.start == 0 for chunk in executor.plans[1].chunks)


def test_backlog_counts_what_is_left_to_compute(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_step_tokens=6, num_blocks=32)
    engine.add(make_request("a", 10))
    engine.add(make_request("b", [9] * 7))
    assert engine.stats().backlog_tokens == 17
    engine.step()
    assert engine.stats().backlog_tokens == 11
    for _ in range(3):
        engine.step()
    assert engine.stats().backlog_tokens == 0


def test_backlog_leaves_out_what_is_cached(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    engine.add(make_request("warm", 12, max_tokens=1))
    run(engine)
    engine.add(make_request("hit", 14))
    assert engine.stats().backlog_tokens == 2


def test_backlog_counts_what_preemption_has_to_compute_again(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=6)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    step_until_preempted(engine)
    young = 8 + 5  # tokens so far, at least two blocks of them cached
    assert 0 < engine.stats().backlog_tokens <= young - 8


def test_configured_length_bounds_the_models(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_len=40, max_model_len=20)
    assert engine.max_model_len == 20
    with pytest.raises(InvalidRequestError, match="20 tokens and the model takes 20"):
        engine.add(make_request(prompt_ids=20))


def test_step_says_how_long_it_took_and_what_it_computed(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    clock = clock_of(engine)
    finish = executor.finish

    def slow(step: FakeStep) -> StepResult:
        clock.now += 0.5
        return finish(step)

    executor.finish = slow  # type: ignore[method-assign]
    engine.add(make_request("a", 16, max_tokens=3))
    first, second = engine.step(), engine.step()
    assert (first.num_prefill_tokens, first.num_decode_tokens) == (16, 0)
    assert (second.num_prefill_tokens, second.num_decode_tokens) == (0, 1)
    assert first.duration_s == pytest.approx(0.5)
    stats = engine.stats()
    assert stats.prefill_tokens_per_s == pytest.approx(32)
    assert stats.decode_step_s == pytest.approx(0.5)
