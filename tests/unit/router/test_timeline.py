import math

import pytest

from core.errors import ErrorCode, UnavailableError
from core.finish import FinishReason
from core.sampling import SamplingParams
from router.fleet.worker import LegEnd, StageTimes
from router.generation import GenerationEnd, GenerationRequest
from router.ledger import Failure
from router.placement.decision import Mode, Placement
from router.timeline import STAGES, RequestTimeline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def placement(prefill: str | None = "p") -> Placement:
    return Placement(
        mode=Mode.DISAGGREGATED if prefill else Mode.DECODE_ONLY,
        worker="d",
        prefill=prefill,
        cached_tokens=0,
        why="test",
        rankings=(),
        refused=(),
    )


def leg_end(attempt: int = 1, **times: float) -> LegEnd:
    return LegEnd(
        request_id="r",
        attempt=attempt,
        reason=FinishReason.LENGTH,
        times=StageTimes(**times) if times else None,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> RequestTimeline:
    request = GenerationRequest(
        request_id="r",
        prompt_ids=[1, 2],
        sampling=SamplingParams(),
        deadline=200.0,
        received_at=99.0,
        tokenized_at=99.5,
    )
    return RequestTimeline(request=request, clock=clock)


def stages(timeline: RequestTimeline) -> dict[str, float]:
    """Stages with time in them; checks what always holds."""
    record = timeline.as_dict()
    listed = record["stages"]
    assert isinstance(listed, list)
    assert all(stage["seconds"] >= 0 for stage in listed)
    assert {stage["name"] for stage in listed} <= set(STAGES)
    total = math.fsum(stage["seconds"] for stage in listed)
    assert total == pytest.approx(record["end_to_end_s"], abs=1e-9)
    return {s["name"]: pytest.approx(s["seconds"], abs=1e-9) for s in listed if s["seconds"]}


def test_intervals_are_split_by_what_the_workers_measured(
    timeline: RequestTimeline, clock: Clock
) -> None:
    timeline.placed(1, placement(), {})
    clock.now = 101.0
    timeline.tokens(1)
    clock.now = 102.0
    timeline.tokens(1)
    clock.now = 105.0
    timeline.tokens(3)
    timeline.leg_ended("p", leg_end(queue_s=0.25, prefill_s=0.5))
    timeline.leg_ended("d", leg_end(transfer_s=0.125, decode_queue_s=0.25, first_decode_s=0.5))
    timeline.ended(GenerationEnd(finish_reason=FinishReason.LENGTH), None)
    clock.now = 105.5
    timeline.closed()
    clock.now = 999.0
    assert stages(timeline) == {
        "tokenize": 0.5,
        "route": 0.5,
        "prefill_queue": 0.25,
        "prefill": 0.5,
        "prefill_rpc": 0.25,
        "transfer": 0.125,
        "decode_queue": 0.25,
        "first_decode": 0.5,
        "handover_rpc": 0.125,
        "decode": 3.0,
        "deliver": 0.5,
    }
    record = timeline.as_dict()
    assert record["end_to_end_s"] == 6.5
    assert record["ttft_s"] == 2.0
    assert record["unattributed_s"] == 0


def test_worker_times_beyond_the_interval_are_cut_and_counted(
    timeline: RequestTimeline, clock: Clock
) -> None:
    timeline.placed(1, placement(None), {})
    clock.now = 101.0
    timeline.tokens(1)
    timeline.leg_ended("d", leg_end(queue_s=1.0, prefill_s=3.0))
    timeline.ended(GenerationEnd(finish_reason=FinishReason.STOP), None)
    timeline.closed()
    measured = stages(timeline)
    assert measured["prefill_queue"] == 0.25 and measured["prefill"] == 0.75
    assert timeline.as_dict()["overrun_s"] == pytest.approx(3.0)


def test_missing_worker_times_are_unattributed(timeline: RequestTimeline, clock: Clock) -> None:
    timeline.placed(1, placement(), {})
    clock.now = 101.0
    timeline.tokens(1)
    clock.now = 103.0
    timeline.tokens(1)
    assert stages(timeline)["first_token"] == 1.0
    assert stages(timeline)["handover"] == 2.0
    assert timeline.as_dict()["unattributed_s"] == pytest.approx(3.0)


def test_failed_attempt_and_the_way_to_the_next_are_stages(
    timeline: RequestTimeline, clock: Clock
) -> None:
    timeline.placed(1, placement(), {})
    clock.now = 103.0
    timeline.tokens(1)
    timeline.attempt_failed(Failure(ErrorCode.WORKER_LOST, "gone", "d"))
    clock.now = 104.0
    timeline.placed(2, placement(None), {})
    clock.now = 106.0
    timeline.tokens(1)
    timeline.leg_ended("d", leg_end(attempt=2, prefill_s=1.5))
    timeline.ended(GenerationEnd(finish_reason=FinishReason.STOP), None)
    timeline.closed()
    assert stages(timeline) == {
        "tokenize": 0.5,
        "route": 0.5,
        "failed_attempt": 3.0,
        "reroute": 1.0,
        "prefill": 1.5,
        "prefill_rpc": 0.5,
    }
    assert timeline.as_dict()["ttft_s"] == 4.0


def test_request_that_was_never_placed_spent_its_time_routing(
    timeline: RequestTimeline, clock: Clock
) -> None:
    clock.now = 110.0
    timeline.ended(None, UnavailableError("nobody"))
    timeline.closed()
    assert stages(timeline) == {"tokenize": 0.5, "route": 10.5}
    assert timeline.as_dict()["outcome"] == "unavailable"


def test_running_request_can_be_looked_at(timeline: RequestTimeline, clock: Clock) -> None:
    timeline.placed(1, placement(), {})
    clock.now = 102.0
    assert stages(timeline) == {"tokenize": 0.5, "route": 0.5, "unfinished": 2.0}
    assert timeline.as_dict()["outcome"] == "running"
