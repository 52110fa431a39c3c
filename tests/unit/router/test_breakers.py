"""What counts against a worker or a pair, and what a client does that must not."""

import pytest
from prometheus_client import CollectorRegistry

from core.errors import ErrorCode
from router.fleet.breaker import BreakerLimits
from router.fleet.breakers import Breakers, Charge
from router.fleet.worker import LinkFailure, WorkerLoad
from router.ledger import Failure
from router.metrics import FleetMetrics
from router.placement.decision import Mode, Placement
from router.timeline import Attempt
from tests.support.engine import FakeClock
from tests.support.router_placement import make_info

LIMITS = BreakerLimits(failures=2, window_s=60.0, open_s=2.0, open_max_s=60.0)


def placed(worker: str, prefill: str | None = None) -> Placement:
    return Placement(
        mode=Mode.LOCAL if prefill is None else Mode.DISAGGREGATED,
        worker=worker,
        prefill=prefill,
        cached_tokens=0,
        why="test",
        rankings=(),
        refused=(),
    )


class Side:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.registry = CollectorRegistry()
        self.breakers = Breakers(LIMITS, FleetMetrics(self.registry), self.clock)

    def attempt_fails(
        self, code: str, placement: Placement, *, cured_by: Placement | None = None
    ) -> None:
        attempt = self.attempt(placement)
        self.clock.now += 0.1
        failure = Failure(ErrorCode(code), "on purpose", placement.worker)
        charges: list[Charge] = []
        self.breakers.failed(failure, attempt, charges)
        if cured_by is not None:
            self.breakers.progressed(charges, self.attempt(cured_by))
            assert not charges

    def attempt(self, placement: Placement, num_tokens: int = 0) -> Attempt:
        return Attempt(
            number=1,
            placement=placement,
            worker_ids={},
            placed_at=self.clock.now,
            num_tokens=num_tokens,
        )

    @property
    def shut(self) -> set[object]:
        distrust = self.breakers.distrust()
        return {*distrust.workers, *distrust.pairs}

    def metric(self, name: str, scope: str) -> float:
        return self.registry.get_sample_value(f"diptych_router_{name}", {"scope": scope}) or 0.0


@pytest.fixture
def side() -> Side:
    return Side()


@pytest.mark.parametrize("code", ["internal", "unavailable"])
def test_a_worker_that_fails_what_another_can_do_is_left_alone(side: Side, code: str) -> None:
    for _ in range(2):
        side.attempt_fails(code, placed("a"), cured_by=placed("b"))
    assert side.shut == {"a"}
    assert "on purpose" in side.breakers.distrust().workers["a"]
    assert side.breakers.describe("a")["state"] == "open"
    assert side.metric("breakers_open", "worker") == 1
    assert side.metric("breaker_openings_total", "worker") == 1
    side.clock.now += 2.0
    assert not side.shut and side.breakers.describe("a")["state"] == "half_open"
    side.breakers.placed(placed("a"))
    assert side.shut == {"a"}, "one request tries it"
    side.breakers.ended([side.attempt(placed("a"))])
    assert side.shut == {"a"}, "it has brought nothing"
    side.breakers.ended([side.attempt(placed("a"), num_tokens=1)])
    assert not side.shut
    assert side.breakers.describe("a") == {"state": "closed", "failures": 0}
    assert side.metric("breakers_open", "worker") == 0


@pytest.mark.parametrize("code", [*ErrorCode])
def test_a_request_that_fails_everywhere_takes_nobody_out(side: Side, code: str) -> None:
    for worker in "abcdabcdabcd":
        side.attempt_fails(code, placed(worker))
    assert not side.shut


@pytest.mark.parametrize(
    "code",
    [
        "invalid_request",
        "context_length_exceeded",
        "not_found",
        "overloaded",
        "deadline_exceeded",
        "unauthenticated",
        "worker_lost",
    ],
)
def test_a_clients_fault_never_counts_even_if_another_worker_can(side: Side, code: str) -> None:
    for _ in range(20):
        side.attempt_fails(code, placed("a"), cured_by=placed("b"))
    assert not side.shut


def test_a_failure_cured_by_the_same_worker_is_nobodys(side: Side) -> None:
    for _ in range(5):
        side.attempt_fails("internal", placed("a"), cured_by=placed("b", prefill="a"))
    assert not side.shut


def test_a_dark_pair_is_remembered_and_its_workers_are_not_blamed(side: Side) -> None:
    side.attempt_fails("kv_transfer_failed", placed("d", prefill="p"))
    assert side.shut == {("p", "d")}
    assert side.breakers.describe(("p", "d"))["state"] == "open"
    assert side.metric("breakers_open", "pair") == 1
    side.clock.now += 2.0
    assert not side.shut
    side.breakers.placed(placed("d", prefill="p"))
    side.attempt_fails("kv_transfer_failed", placed("d", prefill="p"))
    side.clock.now += 3.0
    assert side.shut == {("p", "d")}, "it stays dark for twice as long"


@pytest.mark.parametrize("gone", ["p", "d"])
def test_what_is_known_of_a_pair_ends_with_either_session(side: Side, gone: str) -> None:
    side.attempt_fails("kv_transfer_failed", placed("d", prefill="p"))
    side.breakers.lost(gone, "killed")
    assert not side.shut


def test_a_worker_that_is_lost_again_and_again_is_left_alone_when_it_returns(side: Side) -> None:
    side.breakers.lost("a", "killed")
    assert not side.shut
    side.clock.now += 5.0
    side.breakers.lost("a", "killed")
    assert side.shut == {"a"}
    assert "it was lost: killed" in side.breakers.distrust().workers["a"]


def test_a_pair_between_which_no_test_block_moves_is_dark_for_as_long_as_decode_says_so(
    side: Side,
) -> None:
    side.breakers.attached("p:1", make_info("prefill", "p", epoch=1))
    says = {"p": LinkFailure(1, "nothing came"), "gone": LinkFailure(1, "nothing came")}
    side.breakers.reported("d:1", WorkerLoad(link_failures=says))
    assert side.breakers.distrust().pairs == {
        ("p:1", "d:1"): "KV does not move between them: nothing came"
    }
    side.breakers.reported("d:1", WorkerLoad())
    assert not side.shut
    side.breakers.reported("d:1", WorkerLoad(link_failures=says))
    side.breakers.attached("p:1", make_info("prefill", "p", epoch=2))
    assert not side.shut  # that was another lifetime
    side.breakers.attached("p:1", make_info("prefill", "p", epoch=1))
    side.breakers.lost("d:1", "closed")
    assert not side.shut
