"""A rank's loop: steps are taken in the order and with the overlap that rank 0 has."""

import queue
from typing import Any

import pytest

from core.errors import ConfigError, ErrorCode
from engine.parallel.host_memory import RankCopies
from engine.parallel.pipe import Frame, failure_from, failure_to
from engine.parallel.plan_codec import PlanEncoder
from engine.parallel.rank import _serve
from engine.plan import PENDING, Chunk, StepPlan, StepResult


class Recorder:
    """An executor that writes down what is asked of it."""

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.events: list[str] = []

    def submit(self, plan: StepPlan) -> "Recorder.Step":
        name = plan.chunks[0].request_id
        self.events.append(f"submit {name} {list(plan.chunks[0].token_ids)}")
        return Recorder.Step(self.events, name)

    class Step:
        def __init__(self, events: list[str], name: str) -> None:
            self.events = events
            self.name = name

        def wait(self) -> StepResult:
            self.events.append(f"wait {self.name}")
            return StepResult([None], [None])


class Frames:
    """An inbox whose gaps are where nothing comes for a while."""

    def __init__(self, *frames: tuple[Frame, bytes] | None) -> None:
        self.frames = list(frames)

    def next(self, timeout_s: float | None = None) -> tuple[Frame, bytes]:
        frame = self.frames.pop(0)
        if frame is None:
            assert timeout_s is not None, "it would wait for ever with a step under way"
            raise queue.Empty
        return frame


def serve(overlaps: bool, *gaps: int) -> list[str]:
    encoder, recorder = PlanEncoder(), Recorder(overlaps)
    frames: list[Any] = []
    for index, token_id in enumerate((7, PENDING, PENDING)):
        plan = StepPlan([Chunk(f"s{index}", [token_id], index, [0], None)])
        frames.append((Frame.PLAN, encoder.encode(plan)))
        frames += [None] * (index in gaps)
    inbox: Any = Frames(*frames, (Frame.CLOSE, b""))
    _serve(recorder, inbox, RankCopies(None, 1.0))  # type: ignore[arg-type]
    return recorder.events


def test_steps_in_turn_are_waited_for_one_by_one() -> None:
    assert serve(False) == [
        *("submit s0 [7]", "wait s0", "submit s1 [-1]", "wait s1"),
        *("submit s2 [-1]", "wait s2"),
    ]


def test_a_step_is_waited_for_once_the_next_one_is_under_way() -> None:
    assert serve(True) == [
        *("submit s0 [7]", "submit s1 [-1]", "wait s0"),
        *("submit s2 [-1]", "wait s1", "wait s2"),
    ]


def test_the_last_step_before_a_pause_is_waited_for_in_it() -> None:
    assert serve(True, 1) == [
        *("submit s0 [7]", "submit s1 [-1]", "wait s0", "wait s1"),
        *("submit s2 [-1]", "wait s2"),
    ]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("too large"), ErrorCode.CONFIG, "too large"),
        (RuntimeError("x" * 10_000), ErrorCode.INTERNAL, "RuntimeError: x"),
    ],
)
def test_a_failure_travels_with_its_code(error: Exception, code: ErrorCode, message: str) -> None:
    got = failure_from(failure_to(error))
    assert got[0] is code and got[1].startswith(message) and len(got[1]) <= 4000


@pytest.mark.parametrize("body", [b"", b"\xff", b'["nonsense", "x"]', b'"x"', b"[1]", b"7"])
def test_a_failure_that_says_nothing_is_still_one(body: bytes) -> None:
    assert failure_from(body)[0] is ErrorCode.INTERNAL
