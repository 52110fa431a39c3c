"""Figures of outcomes made by hand."""

from collections.abc import Sequence

import pytest

from diptych.bench.streaming import Outcome
from diptych.bench.summary import Spread, kept, percentile, summary
from router.api.slo import SloTargets

STEADY = [0.1 + 0.01 * index for index in range(101)]


def outcome(
    due_s: float, times: Sequence[float], cause: str = "", tokens: int | None = None
) -> Outcome:
    return Outcome(
        due_s=due_s,
        times=times,
        ended_s=times[-1] if times else 0.2,
        prompt_tokens=50,
        cached_tokens=20,
        output_tokens=len(times) if tokens is None else tokens,
        cause=cause,
    )


def test_summary_counts_who_was_served_well() -> None:
    late = [1.5 + 0.01 * index for index in range(101)]
    stuttering = [moment + (0.04 if index > 50 else 0) for index, moment in enumerate(STEADY)]
    outcomes = [
        outcome(0, STEADY),
        outcome(1, late),
        outcome(2, stuttering),
        outcome(3, [], "HTTP 500"),
    ]
    found = summary(outcomes, SloTargets())
    assert (found.requests, found.failed, found.causes) == (4, 1, {"HTTP 500": 1})
    assert found.duration_s == pytest.approx(3.5)  # until the last token, at 1 + 2.5
    assert found.good_share == 0.5  # one stutter in a hundred gaps is within 99 of 100
    assert found.goodput == pytest.approx(2 / 3.5)
    assert found.met == {"ttft": 0.5, "tpot": 0.75, "itl": 0.75}
    assert found.requests_per_s == pytest.approx(3 / 3.5)
    assert found.output_tokens_per_s == pytest.approx(303 / 3.5)
    assert (found.prompt_tokens, found.cached_tokens) == (150, 60)
    assert found.ttft is not None and found.itl is not None and found.tpot is not None
    assert found.ttft.p50 == pytest.approx(0.1) and found.ttft.p99 == pytest.approx(1.5)
    assert found.itl.p50 == pytest.approx(0.01)
    assert found.tpot.p99 == pytest.approx(0.0104)
    assert summary(outcomes, SloTargets(itl_s=0.005)).goodput == 0


def test_one_slow_gap_in_a_hundred_is_met_and_two_are_not() -> None:
    slo = SloTargets(tpot_s=1, itl_s=0.025)

    def stutters(count: int) -> Outcome:
        gaps = [0.05] * count + [0.01] * (100 - count)
        return outcome(0, [0.1 + sum(gaps[:index]) for index in range(101)])

    assert [kept(stutters(count), slo)["itl"] for count in (0, 1, 2)] == [True, True, False]


def test_several_tokens_in_one_event_are_all_counted() -> None:
    found = summary([outcome(0, [0.1, 0.2, 0.3], tokens=9)], SloTargets())
    assert found.output_tokens == 9
    assert found.tpot is not None and found.tpot.mean == pytest.approx(0.025)
    assert found.itl is not None and found.itl.mean == pytest.approx(0.1)


def test_a_single_token_meets_what_it_lacks() -> None:
    found = summary([outcome(0, [0.1])], SloTargets())
    assert found.good_share == 1
    assert (found.tpot, found.itl) == (None, None)


def test_nothing_that_worked_has_no_latency() -> None:
    found = summary([outcome(0, [], "timeout"), outcome(1, [0.5], "stream cut off")], SloTargets())
    assert (found.requests, found.failed, found.goodput, found.ttft) == (2, 2, 0, None)
    assert found.output_tokens == 0


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 99) == 7
    assert Spread.of(values) == Spread(mean=50.5, p50=50, p90=90, p99=99)
