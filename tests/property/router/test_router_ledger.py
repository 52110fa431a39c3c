import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.ledger import RequestState
from tests.support.router_ledger import World


@pytest.mark.parametrize(
    ("max_tokens", "max_attempts", "failures", "stops", "scored"),
    [
        (1, 2, 1, True, False),
        (3, 2, 0, True, False),
        (3, 3, 1, False, False),
        (2, 3, 2, False, False),
        (2, 3, 1, True, True),
    ],
)
def test_every_course_of_events_ends_once_and_loses_nothing(
    max_tokens: int, max_attempts: int, failures: int, stops: bool, scored: bool
) -> None:
    start = World(max_tokens, max_attempts, failures, stops, scored)
    seen = {start.key}
    stack = [start]
    endings = set()
    while stack:
        world = stack.pop()
        events = list(world.events())
        if not events:
            world.check_rest()
        if world.ledger.state is RequestState.ENDED:
            end, error = world.ledger.end, world.ledger.error
            endings.add(end.finish_reason if end else error.code if error else "left")
        for event in events:
            following = world.fork()
            following.apply(event)
            if following.key not in seen:
                seen.add(following.key)
                stack.append(following)
    assert "length" in endings
    assert ("left" in endings) == ("aborted" in endings) == stops
    assert ("invalid_request" in endings) == (failures > 0)
    assert len(seen) > 50


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 8) | st.integers(30, 50),
    st.integers(1, 4),
    st.integers(0, 6),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_long_course_of_events_ends_once_and_loses_nothing(
    max_tokens: int, max_attempts: int, failures: int, stops: bool, scored: bool, random: object
) -> None:
    world = World(max_tokens, max_attempts, failures, stops, scored)
    while events := sorted(world.events(), key=repr):
        world.apply(random.choice(events))  # type: ignore[attr-defined]
    world.check_rest()
