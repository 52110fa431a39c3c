"""A breaker against what it promises, over any history of work that ends well or fails."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.fleet.breaker import Breaker, BreakerLimits, BreakerState

LIMITS = BreakerLimits(failures=3, window_s=30.0, open_s=2.0, open_max_s=16.0)


@dataclass(frozen=True)
class Work:
    began_at: float


class BreakerMachine(RuleBasedStateMachine):
    """Requests are placed only where the breaker admits them, unless there is nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(LIMITS)
        self.now = 0.0
        self.running: list[Work] = []
        self.news: list[bool] = []
        """Ends that were news, True for a failure, since the last one that went well."""
        self.failed_at = float("-inf")
        self.trials: list[float] = []

    @rule(seconds=st.sampled_from([0.1, 0.9, 2.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(forced=st.booleans())
    def place(self, forced: bool) -> None:
        if self.breaker.admits(self.now) or forced:
            self.breaker.placed(self.now)
            self.running.append(Work(self.now))

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 9), well=st.booleans())
    def end(self, index: int, well: bool) -> None:
        work = self.running.pop(index % len(self.running))
        before = self.breaker.state(self.now)
        if well:
            self.breaker.succeeded(work.began_at)
            if work.began_at >= self.failed_at:
                assert self.breaker.state(self.now) is BreakerState.CLOSED
                assert self.breaker.failures == 0
            else:
                assert self.breaker.state(self.now) is before, "old news changed something"
            return
        opened = self.breaker.failed(work.began_at, self.now, "x")
        if work.began_at < self.failed_at:
            assert not opened and self.breaker.state(self.now) is before
            return
        self.failed_at = self.now
        if before is BreakerState.HALF_OPEN:
            assert opened, "a trial that fails shuts it again"
        if opened:
            assert self.breaker.state(self.now) is BreakerState.OPEN
            wait_s = self.breaker.retry_in_s(self.now)
            assert LIMITS.open_s - 1e-9 <= wait_s <= LIMITS.open_max_s + 1e-9

    @invariant()
    def a_shut_one_opens_again_in_time(self) -> None:
        wait_s = self.breaker.retry_in_s(self.now)
        assert 0 <= wait_s <= LIMITS.open_max_s
        assert self.breaker.admits(self.now) == (wait_s == 0)
        assert self.breaker.admits(self.now + wait_s)

    @invariant()
    def a_closed_one_admits_all_and_has_few_failures(self) -> None:
        if self.breaker.state(self.now) is BreakerState.CLOSED:
            assert self.breaker.admits(self.now)
            assert self.breaker.failures < LIMITS.failures


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.integers(1, 12))
def test_each_failed_trial_doubles_the_time_up_to_its_most(trials: int) -> None:
    breaker, now = Breaker(LIMITS), 0.0
    for _ in range(LIMITS.failures - 1):
        assert not breaker.failed(now, now, "x")
        now += 1
    spans = []
    for _ in range(trials):
        assert breaker.failed(now, now, "x")
        spans.append(breaker.retry_in_s(now))
        now += spans[-1]
        assert breaker.state(now) is BreakerState.HALF_OPEN
        breaker.placed(now)
        assert not breaker.admits(now), "one trial at a time"
    assert spans == [min(2.0 * 2**i, 16.0) for i in range(trials)]
    breaker.succeeded(now)
    assert breaker.admits(now) and breaker.forgettable(now)


def test_failures_that_came_together_count_once_and_old_ones_are_forgotten() -> None:
    breaker = Breaker(LIMITS)
    for _ in range(10):
        breaker.failed(1.0, 2.0, "x")
    breaker.failed(1.5, 2.1, "x")
    assert breaker.failures == 1
    breaker.failed(2.0, 3.0, "x")
    assert breaker.failures == 2
    assert not breaker.failed(33.5, 33.5, "x") and breaker.failures == 1
    assert not breaker.forgettable(60.0) and breaker.forgettable(63.6)


def test_what_has_gone_for_good_is_forgotten() -> None:
    breaker = Breaker(LIMITS)
    for at in range(3):
        breaker.failed(at, at, "x")
    assert breaker.state(2.0) is BreakerState.OPEN
    assert not breaker.forgettable(60.0), "half-open, and to be tried with care"
    assert breaker.forgettable(64.1)
