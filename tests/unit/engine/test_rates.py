import pytest

from engine.rates import StepRates


def test_nothing_is_known_at_first() -> None:
    rates = StepRates()
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (0, 0)


def test_long_prefill_steps_weigh_more_than_short_ones() -> None:
    rates = StepRates()
    rates.observe(4096, 0, 1.0)
    for _ in range(20):
        rates.observe(16, 0, 0.02)
    assert 2800 < rates.prefill_tokens_per_s < 4096, "20 short chunks of 800 tokens/s count little"


def test_rate_follows_a_change() -> None:
    rates = StepRates()
    for _ in range(5):
        rates.observe(100, 0, 1.0)
        rates.observe(0, 8, 0.1)
    for _ in range(200):
        rates.observe(100, 0, 0.5)
        rates.observe(0, 8, 0.2)
    assert rates.prefill_tokens_per_s == pytest.approx(200, rel=0.02)
    assert rates.decode_step_s == pytest.approx(0.2, rel=0.02)


def test_steps_that_measure_something_else_are_left_out() -> None:
    rates = StepRates()
    rates.observe(3, 0, 1.0)  # too few tokens: mostly the step's own overhead
    rates.observe(20, 64, 1.0)  # mostly decodes
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (0, 0)
