"""What the scheduler puts into steps, seen through the plans that an executor gets."""

import pytest

from core.errors import ConfigError
from engine.engine import Engine
from engine.plan import StepPlan
from tests.support.engine import MakeEngine, clock_of, make_request, run, step_until_preempted
from tests.support.fake_executor import kv_of, undisturbed


def spans(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """Request -> first position and number of tokens."""
    return {chunk.request_id: (chunk.start, len(chunk.token_ids)) for chunk in plan.chunks}


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()
        engine.check_integrity()


def test_long_prompt_is_computed_in_chunks_of_the_step_budget(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(max_step_tokens=6)
    engine.add(make_request("r", 14))
    steps(engine, 3)
    assert [spans(plan)["r"] for plan in executor.plans[:3]] == [(0, 6), (6, 6), (12, 2)]
    assert [plan.chunks[0].sample is None for plan in executor.plans[:3]] == [True, True, False]


def test_chunk_limit_leaves_budget_to_the_next_prompt(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(max_step_tokens=10, max_chunk_tokens=4)
    engine.add(make_request("a", 8))
    engine.add(make_request("b", [9] * 8))
    engine.add(make_request("c", [8] * 8))
    steps(engine, 1)
    assert spans(executor.plans[0]) == {"a": (0, 4), "b": (0, 4), "c": (0, 2)}


def test_decodes_go_before_chunks_in_a_mixed_step(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(max_step_tokens=5, num_blocks=32)
    engine.add(make_request("old", 4, max_tokens=20))
    engine.add(make_request("older-prompt", [9] * 14))
    steps(engine, 2)
    assert list(spans(executor.plans[1])) == ["old", "older-prompt"]
    assert spans(executor.plans[1]) == {"old": (4, 1), "older-prompt": (1, 4)}


def test_step_never_exceeds_its_budget(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(max_step_tokens=3, num_blocks=64)
    for index in range(6):
        engine.add(make_request(f"r{index}", [index + 1] * 5))
    run(engine)
    assert max(plan.num_tokens for plan in executor.plans) == 3


def test_running_sequences_are_bounded(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(max_num_seqs=2, num_blocks=64)
    for index in range(5):
        engine.add(make_request(f"r{index}", [index + 1] * 2))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    run(engine)
    assert max(len(plan.chunks) for plan in executor.plans) == 2


def test_admission_leaves_the_watermark_to_running_sequences(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=5, block_size=4)
    engine.add(make_request("a", 8, max_tokens=8))
    engine.add(make_request("b", [9] * 12, max_tokens=1))
    engine.step()
    assert engine.stats().running == 1, "5 blocks: 2 held, 3 wanted, 1 must stay"


def test_sequence_alone_may_use_the_whole_pool(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=5, block_size=4)
    engine.add(make_request("r", 19, max_tokens=1))
    assert len(run(engine).tokens["r"]) == 1


def test_admission_counts_what_running_prompts_still_need(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4, max_step_tokens=8, max_chunk_tokens=4)
    engine.add(make_request("long", 20, max_tokens=1))
    engine.add(make_request("next", [9] * 12, max_tokens=1))
    engine.step()
    assert engine.stats().running == 1
    run(engine)
    assert engine.stats().preemptions == 0


def test_large_request_at_the_head_is_not_overtaken(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4, max_num_seqs=8)
    engine.add(make_request("running", 16, max_tokens=12))
    engine.step()
    engine.add(make_request("large", [9] * 24, max_tokens=1))
    engine.add(make_request("small", [8] * 2, max_tokens=1))
    engine.step()
    assert engine.stats().waiting == 2
    assert list(run(engine).ends) == ["running", "large", "small"]


def test_youngest_is_preempted_and_its_recompute_hits_the_cache(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=6, block_size=4)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    transcript = run(engine)
    assert engine.stats().preemptions >= 1
    assert list(transcript.ends) == ["old", "young"]
    starts = [spans(plan)["old"][0] for plan in executor.plans if "old" in spans(plan)]
    assert starts == sorted(set(starts)), "the oldest was disturbed"
    again = [spans(plan)["young"] for plan in executor.plans if "young" in spans(plan)]
    recomputed = [span for i, span in enumerate(again) if i and span[0] < again[i - 1][0]]
    assert recomputed and all(start > 0 for start, _ in recomputed)
    for name, prompt in (("old", make_request("", 8).prompt_ids), ("young", [9] * 8)):
        expected = undisturbed(prompt, make_request(max_tokens=12).sampling)
        assert transcript.tokens[name] == expected


def test_preempted_request_shows_no_blocks_and_can_be_aborted(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=6, block_size=4)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    step_until_preempted(engine)
    assert list(engine.block_table("young")) == []
    assert engine.num_computed("young") == 0
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    assert engine.abort("young")
    assert engine.stats().waiting == 0
    assert list(run(engine).ends) == ["old"]


def test_nothing_new_is_admitted_when_blocks_run_out(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=6, block_size=4)
    engine.add(make_request("old", 8, max_tokens=12))
    engine.add(make_request("young", [9] * 8, max_tokens=12))
    for index in range(100):
        engine.add(make_request(f"new{index}", [1], max_tokens=1))
        planned = len(executor.plans)
        engine.step()
        if engine.stats().preemptions:
            break
    assert engine.stats().preemptions
    assert set(spans(executor.plans[planned])) <= set(spans(executor.plans[planned - 1]))


def test_preempted_sequences_come_back_oldest_first(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4)
    for age, max_tokens in enumerate((26, 20, 20)):
        engine.add(make_request(f"r{age}", [age + 1] * 4, max_tokens=max_tokens))
    transcript = run(engine)
    assert engine.stats().preemptions >= 2
    assert list(transcript.ends) == ["r0", "r1", "r2"]


def test_sequence_that_came_back_is_still_older_than_later_ones(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=10, block_size=4)
    engine.add(make_request("first", [1] * 4, max_tokens=17))
    engine.add(make_request("second", [2] * 6, max_tokens=25))
    reservation = engine.reserve(make_request("import", [3] * 4, max_tokens=25))
    assert reservation is not None
    step_until_preempted(engine)
    executor.pool.blocks[reservation.block_table[0]][:] = kv_of([3] * 4)
    engine.adopt(reservation, 5)
    assert list(run(engine).ends) == ["first", "second", "import"]
    assert engine.stats().preemptions >= 2


def test_admission_counts_the_cached_blocks_that_it_would_hold(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=6, block_size=4)
    engine.add(make_request("warm", 8, max_tokens=1))
    run(engine)
    engine.add(make_request("running", [9] * 5, max_tokens=3))
    engine.step()
    engine.add(make_request("hit", [*make_request("", 8).prompt_ids, *[7] * 8], max_tokens=1))
    engine.step()
    assert engine.stats().waiting == 1, "2 idle hits and 2 new blocks leave no watermark of 4"


def test_older_prompt_takes_blocks_from_a_younger_decode_of_the_same_step(
    make_engine: MakeEngine,
) -> None:
    engine, executor = make_engine(num_blocks=7, block_size=4, max_chunk_tokens=1)
    engine.add(make_request("old", 20, max_tokens=2))
    engine.add(make_request("young", [9], max_tokens=20))
    transcript = run(engine)
    assert engine.stats().preemptions >= 1
    assert list(transcript.ends) == ["old", "young"]
    preempted_in = next(
        index
        for index, plan in enumerate(executor.plans)
        if index and "young" in spans(executor.plans[index - 1]) and "young" not in spans(plan)
    )
    assert "old" in spans(executor.plans[preempted_in])
    assert transcript.tokens["young"] == undisturbed([9], make_request(max_tokens=20).sampling)


def test_blocks_that_a_preempted_request_was_to_get_go_to_the_older_one(
    make_engine: MakeEngine,
) -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4, max_chunk_tokens=1)
    engine.add(make_request("old", 20, max_tokens=2))
    engine.add(make_request("middle", [9], max_tokens=20))
    engine.add(make_request("young", [8], max_tokens=20))
    while engine.num_computed("young") < 8:
        engine.step()
    engine.hold(engine.block_table("young")[:2])  # so that its preemption frees no block
    step_until_preempted(engine)
    assert engine.stats().preemptions == 1


def test_youngest_prompt_takes_what_room_there_is(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=4, block_size=4)
    reservation = engine.reserve(make_request("import", 4))
    assert reservation is not None
    engine.add(make_request("r", [9] * 7, max_tokens=8))
    steps(engine, 7)
    engine.flush_cache()
    assert engine.num_computed("r") == 12
    assert not engine.has_work, "stuck: the import holds the last block"
    engine.cancel(reservation)
    assert engine.has_work
    assert len(run(engine).tokens["r"]) > 0


def test_same_prompt_at_once_is_computed_once(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=64, max_step_tokens=64)
    for index in range(4):
        engine.add(make_request(f"r{index}", 22, max_tokens=2, seed=index))
    run(engine)
    computed = sum(plan.num_tokens for plan in executor.plans)
    assert computed == 22 + 3 * 2 + 4
    assert engine.stats().cached_tokens == 3 * 20


def test_other_requests_pass_one_that_waits_for_its_prefix(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=64, max_step_tokens=64)
    engine.add(make_request("first", 22))
    engine.add(make_request("same", 22))
    engine.add(make_request("other", [9] * 3))
    steps(engine, 1)
    assert set(spans(executor.plans[0])) == {"first", "other"}
    steps(engine, 2)
    later = [spans(plan)["same"] for plan in executor.plans if "same" in spans(plan)]
    assert later[0] == (20, 2)


def test_longest_prefix_goes_first_but_not_for_ever(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=32, policy="longest_prefix", max_num_seqs=1)
    clock = clock_of(engine)
    engine.add(make_request("warm", 12, max_tokens=1))
    run(engine)
    engine.add(make_request("cold", [9] * 12, max_tokens=1))
    engine.add(make_request("hit", 12, max_tokens=1))
    assert list(run(engine).ends) == ["hit", "cold"]
    engine.add(make_request("patient", [8] * 12, max_tokens=1))
    clock.now += 60
    engine.add(make_request("hit", 12, max_tokens=1))
    assert list(run(engine).ends) == ["patient", "hit"]


def test_first_come_is_first_served_by_default(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=32, max_num_seqs=1)
    engine.add(make_request("warm", 12, max_tokens=1))
    run(engine)
    engine.add(make_request("cold", [9] * 12, max_tokens=1))
    engine.add(make_request("hit", 12, max_tokens=1))
    assert list(run(engine).ends) == ["cold", "hit"]


def test_unknown_policy_is_a_config_error(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="fcfs, longest_prefix, got 'lottery'"):
        make_engine(policy="lottery")


def test_block_tables_are_shared_not_copied(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    seen = []
    submit = executor.submit

    def look(plan: StepPlan) -> object:
        seen.append(plan.chunks[0].block_table)
        return submit(plan)

    executor.submit = look  # type: ignore[method-assign,assignment]
    engine.add(make_request("r", 8))
    steps(engine, 3)
    assert seen[1] is seen[2]
