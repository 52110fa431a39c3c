"""Arrivals and the numbers that are made of outcomes."""

import json
from pathlib import Path

import pytest

from benchmarks.load import Arrival, Outcome, Slo, percentile, poisson, run, summary, trace


def test_poisson_arrivals_come_at_the_rate_and_again_alike() -> None:
    def make(seed: int) -> list[Arrival]:
        return poisson(rate=50, seconds=40, prompt_tokens=3, output_tokens=7, vocab=9, seed=seed)

    arrivals = make(1)
    assert 1800 < len(arrivals) < 2200
    assert all(len(each.prompt) == 3 and max(each.prompt) < 9 for each in arrivals)
    assert [each.at_s for each in arrivals] == sorted(each.at_s for each in arrivals)
    assert arrivals[-1].at_s < 40
    assert arrivals == make(1) != make(2)


def test_a_trace_keeps_shared_prefixes_and_leaves_long_prompts_out(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 2000, "input_length": 700, "output_length": 5, "hash_ids": [3, 4]},
        {"timestamp": 3000, "input_length": 9000, "output_length": 5, "hash_ids": [3] * 18},
        {"timestamp": 4000, "input_length": 600, "output_length": 1, "hash_ids": [3, 5]},
        {"timestamp": 5000, "input_length": 100, "output_length": 9, "hash_ids": [6]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arrivals, left_out = trace(path, requests=2, longest=1000, faster=2, vocab=100)
    assert left_out == 1
    first, second = arrivals
    assert (first.at_s, second.at_s) == (0, 1)
    assert (len(first.prompt), len(second.prompt)) == (700, 600)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:600]
    assert second.output_tokens == 2  # so that there is a time between tokens


def test_summary_counts_who_was_served_well() -> None:
    steady = [0.1 + 0.01 * index for index in range(101)]
    late = [1.5 + 0.01 * index for index in range(101)]
    stuttering = [moment + (0.04 if index > 50 else 0) for index, moment in enumerate(steady)]
    outcomes = [
        Outcome(at_s=0, times=steady),
        Outcome(at_s=1, times=late),
        Outcome(at_s=2, times=stuttering),
        Outcome(at_s=3, times=[], error="refused"),
    ]
    found = summary(outcomes, Slo())
    assert (found["requests"], found["failed"]) == (4, 1)
    assert found["good_share"] == 0.5  # one stutter in a hundred gaps is within p99
    assert found["goodput"] == pytest.approx(2 / 3.5)  # until the last token, at 1 + 2.5
    assert found["output_tokens_per_s"] == pytest.approx(303 / 3.5)
    assert found["ttft_p50_ms"] == pytest.approx(100)
    assert found["itl_p50_ms"] == pytest.approx(10)
    assert summary(outcomes, Slo(itl_p99_s=0.005))["goodput"] == 0


def test_summary_of_nothing_that_worked() -> None:
    failed = [Outcome(at_s=0, times=[], error="x"), Outcome(at_s=1, times=[0.5])]
    assert summary(failed, Slo()) == {"requests": 2, "failed": 2}


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 99) == 7


async def test_a_client_that_reaches_nobody_says_so_for_each_request() -> None:
    arrivals = [Arrival(at_s=0.01 * i, prompt=[1], output_tokens=2) for i in range(3)]
    outcomes = await run(["http://127.0.0.1:9"], arrivals, clients=2)
    assert [each.at_s for each in outcomes] == [0.0, 0.01, 0.02]
    assert all("ConnectError" in each.error for each in outcomes)
