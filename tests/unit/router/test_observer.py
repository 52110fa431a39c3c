from collections.abc import Sequence
from dataclasses import replace

from core.finish import FinishReason
from core.sampling import SamplingParams
from router.fleet.worker import LegEnd, LinkFailure, Role, WorkerLoad, WorkerState, WorkerStatus
from router.generation import GenerationEnd, GenerationRequest
from router.observer import Observer
from router.placement.decision import Mode, Placement
from router.timeline import RequestTimeline, TimelineStore
from tests.support.router_placement import make_view


class Seen:
    """A fleet and a dispatcher that say what they are given."""

    def __init__(self, *statuses: WorkerStatus) -> None:
        self.statuses: Sequence[WorkerStatus] = statuses
        self.store = TimelineStore(8)

    def recent(self, count: int) -> Sequence[RequestTimeline]:
        return self.store.latest(count)


def attached(worker_id: str, role: Role, **load: object) -> WorkerStatus:
    view = make_view(worker_id, role.value)
    return WorkerStatus(
        address=f"{worker_id}:1",
        role=role,
        state=WorkerState.READY,
        cause="",
        info=replace(view.info, worker_id=worker_id, num_blocks=100),
        load=WorkerLoad(**load),  # type: ignore[arg-type]
    )


def lost(address: str) -> WorkerStatus:
    return WorkerStatus(
        address=address,
        role=Role.DECODE,
        state=WorkerState.LOST,
        cause="said nothing for 3 s",
        info=None,
        load=WorkerLoad(),
    )


def timeline(request_id: str, cached: int, *, workers: dict[str, str]) -> RequestTimeline:
    request = GenerationRequest(
        request_id=request_id,
        prompt_ids=list(range(40)),
        sampling=SamplingParams(),
        deadline=200.0,
        received_at=100.0,
        tokenized_at=100.5,
    )
    prefill = workers.get("prefill")
    placement = Placement(
        mode=Mode.DISAGGREGATED if prefill else Mode.DECODE_ONLY,
        worker=workers["decode"],
        prefill=prefill,
        cached_tokens=0,
        why="test",
        rankings=(),
        refused=(),
    )
    seen = RequestTimeline(request=request, clock=lambda: 103.0)
    seen.placed(1, placement, workers)
    seen.tokens(3)
    end = LegEnd(request_id=request_id, attempt=1, reason=FinishReason.LENGTH, cached_tokens=cached)
    seen.leg_ended(prefill or workers["decode"], end)
    seen.ended(GenerationEnd(finish_reason=FinishReason.LENGTH, cached_tokens=cached), None)
    seen.closed()
    return seen


class Trusting:
    def describe(self, key: str | tuple[str, str]) -> dict[str, object]:
        return {"of": key}


def test_workers_show_their_load_and_a_lost_one_why() -> None:
    load = {"running": 3, "held_blocks": 7, "cached_blocks": 11, "decode_step_s": 0.02}
    fleet = Observer(
        *[Seen(attached("d0", Role.DECODE, **load), lost("d1:1"))] * 2, Trusting()
    ).fleet()
    first, second = fleet["workers"]  # type: ignore[misc]
    assert (first["running"], first["decode_step_s"]) == (3, 0.02)
    assert first["kv"] | {"block_size": 0, "block_bytes": 0} == {
        "num_blocks": 100,
        "held_blocks": 7,
        "cached_blocks": 11,
        "block_size": 0,
        "block_bytes": 0,
        "leases": 0,
    }
    assert first["prefill_tokens_per_s"] is None, "not measured is not zero"
    assert second == {
        "address": "d1:1",
        "role": "decode",
        "pool": None,
        "state": "lost",
        "cause": "said nothing for 3 s",
        "breaker": {"of": "d1:1"},
    }


def test_links_are_all_pairs_measured_or_not() -> None:
    seen = Seen(
        attached("p0", Role.PREFILL),
        attached("p1", Role.PREFILL),
        attached(
            "d0",
            Role.DECODE,
            link_bytes_per_s={"p0": 2e9, "gone": 1e9},
            link_latency_s={"p0": 1e-4},
            link_failures={"p1": LinkFailure(1, "nothing came"), "p0": LinkFailure(99, "before")},
            transport="tcp",
        ),
        lost("d1:1"),
    )
    assert Observer(seen, seen, Trusting()).fleet()["links"] == [
        {
            "prefill": "p0",
            "decode": "d0",
            "bytes_per_s": 2e9,
            "latency_s": 1e-4,
            "transport": "tcp",
            "failure": None,
            "breaker": {"of": ("p0:1", "d0:1")},
        },
        {
            "prefill": "p1",
            "decode": "d0",
            "bytes_per_s": None,
            "latency_s": None,
            "transport": "tcp",
            "failure": "nothing came",
            "breaker": {"of": ("p1:1", "d0:1")},
        },
    ]


def test_cache_hit_belongs_to_the_worker_that_computed_the_prompt() -> None:
    seen = Seen(attached("p0", Role.PREFILL), attached("d0", Role.DECODE))
    both = {"prefill": "p0", "decode": "d0"}
    for request in (
        timeline("a", 0, workers=both),
        timeline("b", 32, workers=both),
        timeline("c", 16, workers={"decode": "d0"}),
    ):
        seen.store.add(request)
    workers = Observer(seen, seen, Trusting()).fleet()["workers"]
    hits = {each["worker_id"]: each["cache_hit"] for each in workers}  # type: ignore[attr-defined]
    assert hits == {
        "p0": {"requests": 2, "prompt_tokens": 80, "cached_tokens": 32},
        "d0": {"requests": 1, "prompt_tokens": 40, "cached_tokens": 16},
    }


def test_requests_are_listed_newest_first() -> None:
    seen = Seen()
    for name in ("a", "b", "c"):
        seen.store.add(timeline(name, 0, workers={"decode": "d0"}))
    listed = Observer(seen, seen, Trusting()).requests(2)
    assert [each["request_id"] for each in listed] == ["c", "b"]
    assert listed[0] == {
        "request_id": "c",
        "outcome": "length",
        "mode": "decode_only",
        "attempts": 1,
        "prompt_tokens": 40,
        "output_tokens": 3,
        "cached_tokens": 0,
        "ttft_s": 3.0,
        "end_to_end_s": 3.0,
        "age_s": 3.0,
    }
