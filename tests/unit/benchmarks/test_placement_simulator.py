"""The router's policy against others, on small made-up traffic in virtual time."""

import random

import pytest

from benchmarks.modelled_hardware import llama_70b_on_eight_h200
from benchmarks.placement_simulator import POLICIES, Fleet, Outcome, judge, make_policy, simulate
from diptych.planning.block_cache import hit_rate_of_one_cache
from diptych.planning.trace import (
    BLOCK_SIZE,
    TracedRequest,
    overlay,
)

FLEET = Fleet(prefill=3, decode=1, copies=1, window_s=100.0)


def request(at: float, hashes: list[bytes]) -> TracedRequest:
    return TracedRequest(
        arrives_at=at,
        prompt_tokens=len(hashes) * BLOCK_SIZE + 10,
        output_tokens=20,
        hashes=hashes,
    )


def conversations(rng: random.Random, count: int, turns: int) -> list[TracedRequest]:
    """Each turn adds eight blocks to those of the turn before."""
    requests = []
    for _ in range(count):
        blocks: list[bytes] = []
        at = rng.uniform(0, 20)
        for _ in range(turns):
            blocks = [*blocks, *(rng.randbytes(16) for _ in range(8))]
            requests.append(request(at, blocks))
            at += rng.uniform(2, 8)
    return sorted(requests, key=lambda each: each.arrives_at)


def run(name: str, requests: list[TracedRequest], fleet: Fleet = FLEET) -> tuple[float, Outcome]:
    """Hit rate as a part of the bound, and all of the outcome."""
    jobs = simulate(
        requests,
        make_policy(name, fleet, llama_70b_on_eight_h200(), 5000),
        fleet,
        llama_70b_on_eight_h200(),
        5000,
    )
    assert all(job.ended_at >= job.first_token_at > job.request.arrives_at for job in jobs)
    outcome = judge(jobs, 0.0)
    return outcome.hit_rate / hit_rate_of_one_cache(requests, None), outcome


def test_conversations_stay_where_their_cache_is_and_wait_no_longer_for_it() -> None:
    requests = conversations(random.Random(0), count=60, turns=5)
    results = {name: run(name, requests) for name in POLICIES}
    hits, outcome = results["ours"]
    least_hits, least = results["least loaded"]
    assert 0.95 <= hits <= 1
    assert hits > 1.5 * least_hits
    assert outcome.ttft_p99_s <= least.ttft_p99_s


def test_prefix_that_everybody_asks_for_spreads() -> None:
    """Five workers are needed for it; four must not be left with long queues for their caches."""
    rng = random.Random(0)
    shared = [rng.randbytes(16) for _ in range(16)]
    requests = [request(i / 250, [*shared, rng.randbytes(16)]) for i in range(1500)]
    fleet = Fleet(prefill=6, decode=2, copies=1, window_s=100.0)
    hits, outcome = run("ours", requests, fleet)
    assert hits > 0.98
    assert outcome.ttft_p50_s < 0.1


@pytest.mark.parametrize("copies", [1, 3])
def test_windows_of_a_trace_share_nothing(copies: int) -> None:
    requests = conversations(random.Random(1), count=10, turns=3)
    whole = overlay(requests, copies=copies, window_s=1e6, speed=2.0)
    assert len(whole) == copies * len(requests)
    assert len({each.hashes[0] for each in whole}) == copies * 10
    assert whole == sorted(whole, key=lambda each: each.arrives_at)
