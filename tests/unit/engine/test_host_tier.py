"""The engine with a tier below its pool: prompts that wait for their blocks, or do not."""

from engine.engine import Engine
from engine.kv.tier_copies import MAX_WAIT_S
from tests.support.engine import MakeEngine, clock_of, make_request, run
from tests.support.fake_executor import undisturbed
from tests.support.host_memory import FakeHostMemory

PROMPT = [*range(1, 18)]
OTHERS = ([30] * 17, [31] * 17, [32] * 17)


def engine_without(prompt: list[int], make_engine: MakeEngine) -> tuple[Engine, FakeHostMemory]:
    """An idle engine whose pool has lost a prompt that host memory has."""
    engine, executor = make_engine(num_blocks=12, num_host_blocks=20)
    for number, each in enumerate((prompt, *OTHERS)):
        engine.add(make_request(f"before{number}", each, max_tokens=1))
        run(engine)
        for _ in range(4):
            engine.tend()
    memory = executor.pool.host_memory
    assert memory is not None
    assert engine.stats().host.hit_tokens == 0
    return engine, memory


def ask(engine: Engine, request_id: str = "r", **sampling: object) -> None:
    engine.add(make_request(request_id, PROMPT, **sampling))


def test_a_prompt_is_admitted_with_what_came_back(make_engine: MakeEngine) -> None:
    engine, memory = engine_without(PROMPT, make_engine)
    memory.delay = 3
    ask(engine, max_tokens=4)
    assert engine.stats().backlog_tokens == 1, "what host memory has is no work"
    first, steps = None, 0
    while first is None:
        outputs = engine.step().outputs
        first, steps = (outputs[0] if outputs else None), steps + 1
    assert steps > 3 and first.num_cached_tokens == 16
    done = run(engine)
    assert [*first.token_ids, *done.tokens["r"]] == undisturbed(
        PROMPT, make_request(max_tokens=4).sampling
    )
    assert engine.stats().host.hit_tokens == 16


def test_others_go_on_while_blocks_come_back(make_engine: MakeEngine) -> None:
    engine, memory = engine_without(PROMPT, make_engine)
    memory.delay = 40
    ask(engine)
    engine.add(make_request("other", [40] * 9, max_tokens=3))
    for _ in range(6):
        engine.step()
    assert engine.stats().waiting == 1
    assert engine.stats().running == 0, "the other one has ended"
    assert "r" in run(engine).ends


def test_an_abort_leaves_the_blocks_to_whoever_comes_next(make_engine: MakeEngine) -> None:
    engine, memory = engine_without(PROMPT, make_engine)
    memory.delay = 5
    ask(engine)
    engine.step()
    assert engine.stats().held_blocks > 0
    assert engine.abort("r")
    run(engine)
    assert engine.stats().held_blocks == 0
    ask(engine, "next", max_tokens=1)
    assert run(engine).ends["next"].num_cached_tokens == 16
    assert engine.stats().host.hit_tokens == 16


def test_a_copy_that_hangs_does_not_hang_the_prompt(make_engine: MakeEngine) -> None:
    engine, memory = engine_without(PROMPT[:9], make_engine)
    memory.delay = 1_000_000
    engine.add(make_request("r", PROMPT[:9], max_tokens=2))
    for _ in range(5):
        assert engine.has_work
        assert not engine.step().outputs
    clock = clock_of(engine)
    clock.now += MAX_WAIT_S
    done = run(engine)
    assert done.ends["r"].num_cached_tokens == 0
    assert done.tokens["r"] == undisturbed(PROMPT[:9], make_request(max_tokens=2).sampling)
    assert not engine.has_work


def test_a_copy_that_can_not_be_started_is_done_without(make_engine: MakeEngine) -> None:
    engine, memory = engine_without(PROMPT, make_engine)
    memory.refuses = True
    ask(engine, max_tokens=3)
    done = run(engine)
    assert done.ends["r"].num_cached_tokens == 0
    assert done.tokens["r"] == undisturbed(PROMPT, make_request(max_tokens=3).sampling)
    assert engine.host_hashes() == []
