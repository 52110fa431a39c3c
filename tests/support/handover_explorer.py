"""Drives a world of two hand-over machines: through every state, or on random walks.

Used by tests/property/kvtransfer; what may happen and what must hold is in handover_world.py,
the way there and back in handover_course.py.
"""

import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.handover_course import drain, prepared
from tests.support.handover_scenario import Scenario
from tests.support.handover_world import Violation, World

_WEIGHTS = {"break": 0.01, "lose": 0.01, "decode aborts": 0.02, "prefill fails": 0.02, "time": 0.1}
"""Of events in random walks; others have 1."""


def explore(scenario: Scenario, max_states: int = 30_000) -> int:
    """Visit every state, breadth first; returns how many there were.

    Raises:
        Violation: with the shortest sequence of events that leads to it.
    """
    start = pickle.dumps(prepared(scenario), -1)
    parents: dict[bytes, tuple[bytes, str] | None] = {start: None}
    todo = deque([start])
    while todo:
        state = todo.popleft()
        names = [name for name, _ in pickle.loads(state).events()]
        for name in names:
            world = pickle.loads(state)
            with _told(lambda n=name, s=state: _path(parents, s, n)):  # type: ignore[misc]
                dict(world.events())[name](world)
            after = pickle.dumps(world, -1)
            if after not in parents:
                parents[after] = (state, name)
                todo.append(after)
        if scenario.last_time == 0 or not names:
            with _told(lambda s=state: _path(parents, s, "drain")):  # type: ignore[misc]
                drain(pickle.loads(state))
        assert len(parents) <= max_states, f"more than {max_states} states"
    return len(parents)


def wander(scenario: Scenario, seed: int, steps: int) -> World:
    """Take random steps from the start, then drain; returns the last state."""
    rng = random.Random(seed)
    world = prepared(scenario)
    names = []
    with _told(lambda: names):
        for _ in range(steps):
            events = list(world.events())
            if not events:
                break
            weights = [_WEIGHTS.get(name.rstrip(" 0123456789"), 1) for name, _ in events]
            name, event = rng.choices(events, weights)[0]
            names.append(name)
            event(world)
        names.append("drain")
        drain(world)
    return world


@contextmanager
def _told(path: Callable[[], list[str]]) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise Violation(f"{error}\n  " + "\n  ".join(path())) from error


def _path(parents: dict[bytes, tuple[bytes, str] | None], state: bytes, last: str) -> list[str]:
    names = [last]
    while (parent := parents[state]) is not None:
        state, name = parent
        names.append(name)
    return names[::-1]
