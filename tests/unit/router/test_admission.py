import pytest

from core.errors import OverloadedError
from router.admission import Admission, AdmissionLimits, Priority, Ticket

NEVER = 1e9


def make(running: int = 1, queued: int = 100) -> Admission:
    return Admission(AdmissionLimits(max_running=running, max_queued=queued, max_backlog_s=2.0))


def ticket(
    name: str,
    key: str = "a",
    *,
    priority: Priority = Priority.NORMAL,
    tokens: int = 10,
    deadline: float = NEVER,
) -> Ticket:
    return Ticket(request_id=name, key=key, priority=priority, tokens=tokens, deadline=deadline)


def offer(admission: Admission, *tickets: Ticket) -> None:
    for each in tickets:
        assert admission.offer(each, 0.0, 0.0) is None


def serve(admission: Admission, backlog_s: float = 0.0) -> str | None:
    """Let the next one run, and end it at once."""
    admitted = admission.next(backlog_s)
    if admitted is None:
        return None
    admission.leave(admitted.request_id, 1.0)
    return admitted.request_id


def serve_all(admission: Admission) -> list[str]:
    served = []
    while (name := serve(admission)) is not None:
        served.append(name)
    return served


def test_as_many_run_as_may_and_the_others_wait() -> None:
    admission = make(running=2)
    offer(admission, *(ticket(name) for name in "xyz"))
    assert [admission.next(0.0) is not None for _ in range(3)] == [True, True, False]
    assert (admission.running, admission.queued) == (2, 1)
    admission.leave("x", 1.0)
    assert serve(admission) == "z"


def test_nothing_is_let_out_while_every_worker_has_enough_to_do() -> None:
    admission = make()
    offer(admission, ticket("x"))
    assert serve(admission, backlog_s=2.1) is None
    assert serve(admission, backlog_s=2.0) == "x"


def test_higher_classes_go_first() -> None:
    admission = make()
    for name, priority in zip("lnh", reversed(Priority), strict=True):
        offer(admission, ticket(name, priority=priority))
    assert serve_all(admission) == ["h", "n", "l"]


def test_a_flood_of_one_key_delays_only_itself() -> None:
    admission = make()
    offer(admission, *(ticket(f"a{i}", "a") for i in range(5)))
    offer(admission, ticket("b0", "b"), ticket("b1", "b"))
    assert serve_all(admission) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_turns_are_by_tokens_not_by_requests() -> None:
    admission = make()
    offer(admission, *(ticket(f"a{i}", "a", tokens=30) for i in range(3)))
    offer(admission, *(ticket(f"b{i}", "b", tokens=10) for i in range(6)))
    assert serve_all(admission)[:6] == ["a0", "b0", "b1", "b2", "a1", "b3"]


def test_who_was_away_gets_no_credit_for_it() -> None:
    admission = make()
    offer(admission, *(ticket(f"a{i}", "a") for i in range(4)))
    assert [serve(admission) for _ in range(3)] == ["a0", "a1", "a2"]
    offer(admission, *(ticket(f"b{i}", "b") for i in range(3)))
    assert serve_all(admission) == ["b0", "a3", "b1", "b2"]


def test_request_that_would_come_too_late_is_refused_with_the_wait() -> None:
    admission = make(running=2)
    offer(admission, ticket("x"), ticket("y"))
    admission.next(0.0)
    admission.next(0.0)
    for _ in range(50):
        admission.leave("x", 8.0)
        offer(admission, ticket("x"))
        admission.next(0.0)
    late = ticket("late", deadline=104.9)
    assert admission.predicted_wait_s(late.priority, late.key, 1.0) == pytest.approx(5.0, abs=0.1)
    with pytest.raises(OverloadedError, match=r"wait 5.0 s.*Try again in 5 s") as caught:
        admission.offer(late, 100.0, 1.0)
    assert caught.value.retry_after_s == pytest.approx(5.0, abs=0.1)
    assert admission.offer(ticket("in time", deadline=105.1), 100.0, 1.0) is None


def test_full_queue_refuses_who_has_no_more_right_than_those_in_it() -> None:
    admission = make(queued=1)
    offer(admission, ticket("x"), ticket("y"))
    assert not admission.open
    with pytest.raises(OverloadedError, match="0 requests running and 2 waiting") as caught:
        admission.offer(ticket("z"), 0.0, 0.0)
    assert caught.value.retry_after_s >= 1


def test_full_queue_makes_room_at_the_cost_of_who_has_most_in_it() -> None:
    admission = make(running=1, queued=3)
    offer(admission, *(ticket(f"a{i}", "a") for i in range(4)))
    victim = admission.offer(ticket("b", "b"), 0.0, 0.0)
    assert victim is not None and victim.request_id == "a3"
    assert serve_all(admission) == ["a0", "b", "a1", "a2"]


def test_full_queue_makes_room_for_a_higher_class_only() -> None:
    admission = make(running=1, queued=0)
    offer(admission, ticket("low", priority=Priority.LOW))
    victim = admission.offer(ticket("high", priority=Priority.HIGH), 0.0, 0.0)
    assert victim is not None and victim.request_id == "low"
    with pytest.raises(OverloadedError):
        admission.offer(ticket("low", "b", priority=Priority.LOW), 0.0, 0.0)


def test_who_gives_up_leaves_the_queue_as_it_was() -> None:
    admission = make()
    offer(admission, ticket("a0", "a"), ticket("b0", "b"), ticket("a1", "a"))
    admission.leave("a0", 1.0)
    admission.leave("unknown", 1.0)
    offer(admission, ticket("a2", "a"))
    assert serve_all(admission) == ["a1", "b0", "a2"]
    assert (admission.running, admission.queued) == (0, 0)
