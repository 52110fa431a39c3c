"""Arrivals, their lengths and their prompts: right, and again alike for a seed."""

import math
from itertools import islice, pairwise

import pytest

from core.errors import ConfigError
from diptych.bench.arrivals import Arrival, Lengths, Sizes, open_loop, replayed
from diptych.bench.jobs import Target
from diptych.bench.load import shared
from diptych.bench.prompts import Prompts
from diptych.planning.trace import TracedRequest


def sizes(seed: int = 1, prompt: str = "3..9", output: str = "7") -> Sizes:
    return Sizes(prompt=Lengths.of(prompt), output=Lengths.of(output), seed=seed)


@pytest.mark.parametrize("text", ["", "x", "0", "5..", "9..3", "-1", "1.5"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a length is"):
        Lengths.of(text)


def test_poisson_arrivals_come_at_the_rate_and_again_alike() -> None:
    arrivals = open_loop(sizes(), rate=50, seconds=40)
    assert 1800 < len(arrivals) < 2200
    assert {each.prompt_tokens for each in arrivals} == set(range(3, 10))
    assert {each.output_tokens for each in arrivals} == {7}
    times = [each.at_s for each in arrivals]
    assert times == sorted(times) and times[-1] < 40
    gaps = [later - sooner for sooner, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert spread == pytest.approx(mean, rel=0.1)  # as of an exponential distribution
    assert (
        arrivals
        == open_loop(sizes(), rate=50, seconds=40)
        != open_loop(sizes(2), rate=50, seconds=40)
    )
    assert open_loop(sizes(), rate=50, requests=10, seconds=40) == arrivals[:10]


def test_an_infinite_rate_is_all_at_once_and_needs_an_end() -> None:
    assert {each.at_s for each in open_loop(sizes(), rate=math.inf, requests=5)} == {0.0}
    with pytest.raises(ConfigError, match="need an end"):
        open_loop(sizes(), rate=math.inf, seconds=5)
    with pytest.raises(ConfigError, match="No request comes"):
        open_loop(sizes(), rate=1e-6, seconds=0.1)


def test_a_trace_keeps_its_times_and_leaves_out_what_is_too_long() -> None:
    traced = [
        TracedRequest(arrives_at=at, prompt_tokens=prompt, output_tokens=5, hashes=[b"\x07"])
        for at, prompt in ((0, 9000), (2, 700), (3, 9000), (4, 600), (9, 600))
    ]
    found, left_out = replayed(traced, longest=1000, seconds=5)
    assert [(each.at_s, each.prompt_tokens, each.blocks) for each in found] == [
        (0, 700, ["07"]),
        (2, 600, ["07"]),
    ]
    assert left_out == 2
    with pytest.raises(ConfigError, match="at most 10 tokens"):
        replayed(traced, longest=10)


def test_prompts_have_their_length_and_share_what_is_meant_alone() -> None:
    prompts = Prompts(seed=3, ids=range(100, 500), shared_tokens=40)
    first, second = (
        prompts.write(Arrival(number=n, prompt_tokens=90, output_tokens=1)) for n in (1, 2)
    )
    assert len(first) == len(second) == 90
    assert first[:40] == second[:40]
    assert sum(a == b for a, b in zip(first[40:], second[40:], strict=True)) < 5
    assert first == prompts.write(Arrival(number=1, prompt_tokens=90, output_tokens=1))
    assert set(first) <= set(range(100, 500))


def test_equal_blocks_of_a_trace_are_equal_tokens() -> None:
    prompts = Prompts(seed=3, ids=range(1000))
    first, second = (
        prompts.write(Arrival(number=n, prompt_tokens=1100, output_tokens=1, blocks=blocks))
        for n, blocks in ((1, ["a", "b"]), (2, ["a", "c"]))
    )
    assert first[:512] == second[:512]
    assert first[512:1024] != second[512:1024]
    assert len(first) == 1100


def test_words_make_up_for_template_and_long_tokens() -> None:
    prompts = Prompts(seed=3, tokens_per_word=2.0, frame_tokens=20, shared_tokens=10)
    text = prompts.write(Arrival(number=1, prompt_tokens=100, output_tokens=1))
    other = prompts.write(Arrival(number=2, prompt_tokens=100, output_tokens=1))
    assert isinstance(text, str) and isinstance(other, str)
    assert len(text.split()) == 40
    assert text.split()[:5] == other.split()[:5] and text != other


def test_a_load_is_divided_without_loss() -> None:
    arrivals = open_loop(sizes(), rate=math.inf, requests=11)
    target = Target(url="http://here", model="m")
    jobs = shared(
        [target], Prompts(seed=0), arrivals, clients=4, concurrency=7, warmup=arrivals[:3]
    )
    assert [job.concurrency for job in jobs] == [2, 2, 2, 1]
    assert sorted(each.number for job in jobs for each in job.arrivals) == list(range(11))
    assert sum(len(job.warmup) for job in jobs) == 3
    assert len(shared([target], Prompts(seed=0), arrivals[:2], clients=4)) == 2
    endless = [islice(sizes().endless(share, 3), 2) for share in range(3)]
    assert sorted(each.number for part in endless for each in part) == list(range(6))
