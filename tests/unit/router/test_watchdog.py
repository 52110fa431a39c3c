"""A stage is stuck if its worker serves later ones or nobody, and never for being late alone."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet.worker import WorkerLoad
from router.watchdog import MAX_TRIALS, MIN_BUDGET_S, OVERTAKERS, Stage, Watch, Watchdog

BUDGET_S = 10.0
WATCH = Watch(Stage.FIRST_TOKEN, "w", 100.0)


@pytest.fixture
def dog() -> Watchdog:
    return Watchdog(stuck_after_s=BUDGET_S)


def serve(dog: Watchdog, *began_at: float, stage: Stage = Stage.FIRST_TOKEN) -> None:
    for moment in began_at:
        dog.served(Watch(stage, "w", moment))


def test_a_worker_that_does_nothing_for_anybody_has_lost_it(dog: Watchdog) -> None:
    dog.worked("w", 101.0)
    assert not dog.verdict(WATCH, BUDGET_S, 109.9)
    assert not dog.verdict(WATCH, BUDGET_S, 110.9), "it worked less than a budget ago"
    assert "does nothing" in dog.verdict(WATCH, BUDGET_S, 111.0)
    dog.worked("w", 111.0)
    assert not dog.verdict(WATCH, BUDGET_S, 120.0)


def test_a_worker_that_serves_those_that_came_later_has_lost_it(dog: Watchdog) -> None:
    dog.worked("w", 110.0)
    serve(dog, *(101.0 + i for i in range(OVERTAKERS - 1)))
    assert not dog.verdict(WATCH, BUDGET_S, 111.0)
    serve(dog, 105.0)
    assert "came later" in dog.verdict(WATCH, BUDGET_S, 111.0)
    assert not dog.verdict(WATCH, BUDGET_S, 109.0), "its time is not up"
    other = Watch(Stage.TRANSFER, "w", 100.0)
    assert not dog.verdict(other, BUDGET_S, 111.0), "those were in another stage"
    serve(dog, 99.0)
    assert not dog.verdict(WATCH, BUDGET_S, 111.0), "its turn came between theirs"


BEFORE = WorkerLoad(backlog_tokens=5000, held_blocks=10, link_bytes_per_s={"p": 1e8})
MORE_TO_DO = replace(BEFORE, backlog_tokens=6000)


@pytest.mark.parametrize(
    "after",
    [
        replace(MORE_TO_DO, backlog_tokens=4000),
        replace(MORE_TO_DO, held_blocks=11),
        replace(MORE_TO_DO, link_bytes_per_s={"p": 2e8}),
    ],
)
def test_work_on_what_takes_long_shows_in_load_reports(dog: Watchdog, after: WorkerLoad) -> None:
    dog.reported("w", BEFORE, 100.0)
    dog.reported("w", MORE_TO_DO, 109.0)
    assert dog.verdict(WATCH, BUDGET_S, 110.0), "more to do is not more done"
    dog.reported("w", after, 109.5)
    assert not dog.verdict(WATCH, BUDGET_S, 110.0)
    dog.lost("w")
    assert dog.verdict(WATCH, BUDGET_S, 110.0)


def test_a_budget_follows_from_the_prediction_and_the_deadline(dog: Watchdog) -> None:
    assert dog.budget_s(WATCH, predicted_s=0.1, deadline=700.0) == BUDGET_S
    assert dog.budget_s(WATCH, predicted_s=30.0, deadline=700.0) == 60.0
    assert dog.budget_s(WATCH, predicted_s=0.1, deadline=112.0) == pytest.approx(4.0)
    assert dog.budget_s(WATCH, predicted_s=0.1, deadline=101.0) == MIN_BUDGET_S


# In overload what comes waits longer and longer, but in order: nothing may be taken away then.
@settings(max_examples=25)
@given(
    service_s=st.lists(st.floats(0.01, 30.0), min_size=10, max_size=30),
    rate=st.floats(0.1, 50.0),
)
def test_a_queue_that_is_served_in_order_is_left_alone(service_s: list[float], rate: float) -> None:
    dog = Watchdog(stuck_after_s=BUDGET_S)
    began = [i / rate for i in range(len(service_s))]
    now, load = 0.0, 10**6
    for first, seconds in enumerate(service_s):
        until = max(now, began[first]) + seconds
        while now < until:  # it computes chunk by chunk, and reports
            now, load = min(until, now + 1.0), load - 1
            dog.reported("w", WorkerLoad(backlog_tokens=load), now)
            waiting = [Watch(Stage.FIRST_TOKEN, "w", at) for at in began[first:] if at <= now]
            assert not any(dog.verdict(watch, BUDGET_S, now) for watch in waiting)
        dog.worked("w", now)
        serve(dog, began[first])


def test_trials_begin_with_one_and_become_more_while_they_are_right(dog: Watchdog) -> None:
    assert [dog.try_elsewhere() for _ in range(2)] == [True, False]
    dog.tried(None)
    assert [dog.try_elsewhere() for _ in range(2)] == [True, False]
    dog.tried(True)
    assert [dog.try_elsewhere() for _ in range(3)] == [True, True, False]
    for _ in range(2):
        dog.tried(True)
    for _ in range(20):
        taken = 0
        while dog.try_elsewhere():
            taken += 1
        for _ in range(taken):
            dog.tried(True)
    assert taken == MAX_TRIALS
    assert dog.try_elsewhere()
    dog.tried(False)
    assert [dog.try_elsewhere() for _ in range(2)] == [True, False]
