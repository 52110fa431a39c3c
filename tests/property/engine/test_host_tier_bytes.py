"""Real KV through a real thread: whatever is asked in whatever order, greedy output stays the same.

One engine with a pool of little more than a prompt lives through all examples, so each finds what
the ones before it left in either tier.
"""

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.llm import LLM
from tests.support.models import make_checkpoint

NUM_PROMPTS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = [
    [random.Random(i % 3).randrange(3, 280) for _ in range(24)]
    + [random.Random(9 + i).randrange(3, 280) for _ in range(5 * i)]
    for i in range(NUM_PROMPTS)
]
"""Three stems, and tails of many lengths."""


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, list[list[int]]]]:
    """The engine under test, and what an engine with room for everything answers."""
    path = make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    config = EngineConfig(
        model=str(path), attention_backend="torch_native", block_size=4, num_threads=1
    )
    plain = LLM(config)
    expected = [list(done.token_ids) for done in plain.generate(PROMPTS, GREEDY)]
    plain.close()
    small = EngineConfig(
        model=str(path),
        attention_backend="torch_native",
        block_size=4,
        num_threads=1,
        num_blocks=24,
        max_step_tokens=32,
        host_kv_bytes=1 << 20,
    )
    llm = LLM(small)
    yield llm, expected
    assert llm.engine.stats().host.hit_tokens > 0
    llm.close()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batches=st.lists(
        st.lists(st.integers(0, NUM_PROMPTS - 1), min_size=1, max_size=4), min_size=1, max_size=4
    )
)
def test_greedy_output_is_that_of_an_engine_with_room_for_everything(
    llms: tuple[LLM, list[list[int]]], batches: list[list[int]]
) -> None:
    llm, expected = llms
    for batch in batches:
        done = llm.generate([PROMPTS[index] for index in batch], GREEDY)
        assert [list(one.token_ids) for one in done] == [expected[index] for index in batch]
        llm.engine.check_integrity()
        assert llm.engine.stats().held_blocks == 0
