import pytest

from router.access.allowance import Allowance, Limits, duration
from router.api.errors import HttpError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shown(allowance: Allowance) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in allowance.headers()}


def retry_after(error: HttpError) -> int:
    assert error.status == 429
    return int(dict(error.headers)[b"retry-after"])


def test_requests_of_a_minute_refill_evenly(clock: Clock) -> None:
    allowance = Allowance("k", Limits(requests_per_minute=6), clock)
    for _ in range(6):
        with allowance.request():
            pass
    with pytest.raises(HttpError, match="6 requests a minute") as caught, allowance.request():
        pass
    assert retry_after(caught.value) == 10
    assert shown(allowance) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now += retry_after(caught.value)
    with allowance.request():
        pass
    clock.now += 600
    assert shown(allowance)["x-ratelimit-remaining-requests"] == "6"


def test_outputs_make_debts_that_have_to_be_paid_first(clock: Clock) -> None:
    allowance = Allowance("k", Limits(tokens_per_minute=60), clock)
    allowance.take_prompt(10)
    assert shown(allowance)["x-ratelimit-remaining-tokens"] == "50"
    allowance.take_output(80)
    assert shown(allowance)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(HttpError, match="60 tokens a minute; this prompt has 5") as caught:
        allowance.take_prompt(5)
    assert retry_after(caught.value) == 35
    clock.now += 35
    allowance.take_prompt(5)


def test_a_prompt_above_the_limit_waits_for_a_full_bucket(clock: Clock) -> None:
    allowance = Allowance("k", Limits(tokens_per_minute=60), clock)
    allowance.take_prompt(500)
    with pytest.raises(HttpError) as caught:
        allowance.take_prompt(500)
    clock.now += retry_after(caught.value)
    allowance.take_prompt(500)


def test_requests_at_once(clock: Clock) -> None:
    allowance = Allowance("k", Limits(max_concurrent=1), clock)
    with (
        allowance.request(),
        pytest.raises(HttpError, match="1 requests at once"),
        allowance.request(),
    ):
        pass
    with pytest.raises(ZeroDivisionError), allowance.request():
        raise ZeroDivisionError
    with allowance.request():
        pass
    assert allowance.headers() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.02, "20ms"), (1, "1s"), (1.46, "1.5s"), (59.99, "60s"), (360, "6m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
