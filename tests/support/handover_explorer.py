"""Drives a world of two hand-over machines: through every state, or on random walks.

Used by tests/property/kvtransfer; what may happen and what must hold is in handover_world.py,
the way there and back in handover_course.py.
"""

import copyreg
import io
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args

from core.kv_layout import KvLayout
from kvtransfer.export_book import Ending
from kvtransfer.export_config import ExportConfig
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.handover_record import PendingRead
from kvtransfer.messages import DecodeMessage, Key, PrefillMessage
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
    start = _packed(prepared(scenario))
    parents: dict[bytes, tuple[bytes, str] | None] = {start: None}
    todo = deque([start])
    while todo:
        state = todo.popleft()
        world = pickle.loads(state)
        events = list(world.events())
        for name, event in events:
            with _told(lambda n=name, s=state: _path(parents, s, n)):  # type: ignore[misc]
                event(world)
            after = _packed(world)
            if after not in parents:
                parents[after] = (state, name)
                todo.append(after)
            world = pickle.loads(state)
        if scenario.last_time == 0 or not events:
            with _told(lambda s=state: _path(parents, s, "drain")):  # type: ignore[misc]
                drain(world)
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


def _packed(world: World) -> bytes:
    """A state as bytes that equal states share."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, -1)
    pickler.dispatch_table = _reducers()
    pickler.dump(world)
    return file.getvalue()


# What never changes is packed as a number, and is the same object in every world: taking it apart
# and putting it together again was most of the work.


@cache
def _reducers() -> dict[type, Any]:
    kinds = (Key, KvLayout, Scenario, HandoverConfig, ExportConfig, Ending, PendingRead)
    messages = (*get_args(DecodeMessage), *get_args(PrefillMessage))
    return copyreg.dispatch_table | dict.fromkeys((*kinds, *messages), _as_number)


def _as_number(value: object) -> tuple[Callable[[int], object], tuple[int]]:
    numbers, values = _numbers(), _values()
    key = (type(value), value)
    if key not in numbers:
        numbers[key] = len(values)
        values.append(value)
    return _of_number, (numbers[key],)


def _of_number(number: int) -> object:
    return _values()[number]


@cache
def _numbers() -> dict[tuple[type, object], int]:
    return {}


@cache
def _values() -> list[object]:
    return []


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
