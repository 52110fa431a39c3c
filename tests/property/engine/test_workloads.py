"""Whole workloads on pools far too small for them: preemption must not show in any token."""

from dataclasses import dataclass

from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.support.engine import Transcript, make_engine, make_request
from tests.support.fake_executor import undisturbed


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    max_tokens: int
    abort_after: int | None


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=st.builds(
        lambda stem, length: [stem] * length, st.integers(1, 3), st.sampled_from([1, 4, 7, 8, 13])
    ),
    max_tokens=st.integers(1, 24),
    abort_after=st.sampled_from([None, None, None, 2, 9]),
)


@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(arrivals, min_size=2, max_size=8),
    num_blocks=st.integers(5, 9),
    max_step_tokens=st.sampled_from([2, 5, 16]),
    max_chunk_tokens=st.sampled_from([None, 3]),
    policy=st.sampled_from(["fcfs", "longest_prefix"]),
    prefix_caching=st.sampled_from([True, True, False]),
    overlaps=st.booleans(),
)
def test_engine_under_any_workload_gives_the_undisturbed_tokens(
    work: list[Arrival], num_blocks: int, **limits: object
) -> None:
    engine, _ = make_engine(num_blocks=num_blocks, block_size=4, **limits)
    transcript = Transcript()
    aborted = set()
    for step in range(3000):
        for index, arrival in enumerate(work):
            if arrival.step == step:
                engine.add(make_request(f"r{index}", arrival.prompt, max_tokens=arrival.max_tokens))
            due = arrival.abort_after is not None and arrival.step + arrival.abort_after == step
            if due and engine.abort(f"r{index}"):
                aborted.add(f"r{index}")
        if not engine.has_work and step > 24:
            break
        for output in engine.step().outputs:
            transcript.take(output)
        engine.check_integrity()
    stats = engine.stats()
    event(f"preemptions: {min(stats.preemptions, 3)}")
    assert (stats.held_blocks, stats.running, stats.waiting) == (0, 0, 0)
    for index, arrival in enumerate(work):
        request = make_request(f"r{index}", arrival.prompt, max_tokens=arrival.max_tokens)
        expected = undisturbed(arrival.prompt, request.sampling, max_len=engine.max_model_len)
        tokens = transcript.tokens.get(f"r{index}", [])
        if f"r{index}" in aborted:
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
