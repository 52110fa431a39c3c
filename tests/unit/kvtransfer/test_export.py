"""Prefill's half of the hand-over, event by event."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from core.errors import ErrorCode
from kvtransfer.actions import CancelPrefill, CloseLink, ExportAction, FreeBlocks, Send
from kvtransfer.export import ExportMachine
from kvtransfer.export_config import ExportConfig
from kvtransfer.messages import (
    Claim,
    Key,
    Offer,
    Progress,
    Refused,
    Release,
    Renew,
    Renewed,
    Revoke,
)
from tests.support.kv_messages import KEY, LAYOUT, LOST, make_commit, make_hello

TTL = 10.0
OTHER = KEY._replace(attempt=1)


@pytest.fixture
def machine() -> ExportMachine:
    machine = ExportMachine(make_hello(ttl_s=TTL), ExportConfig(max_early_claims=2, max_endings=3))
    machine.link_opened(1)
    machine.received(1, make_hello("D"), 0)
    return machine


def sent(actions: Sequence[ExportAction]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Send)]


def finish(machine: ExportMachine, now: float = 0) -> list[ExportAction]:
    return [
        *machine.progressed(KEY, [5, 9], now),
        *machine.committed(KEY, 42, None, 4, now),
    ]


def lease(machine: ExportMachine) -> None:
    machine.submitted(KEY, "D", 6, 0)
    machine.received(1, Claim(KEY), 0)


def test_hello_is_answered_and_a_second_one_ends_the_link(machine: ExportMachine) -> None:
    machine.link_opened(2)
    assert sent(machine.received(2, make_hello("D2"), 0)) == [make_hello(ttl_s=TTL)]
    assert any(isinstance(a, CloseLink) for a in machine.received(2, make_hello("D2"), 0))


def test_an_end_by_the_first_token_is_told_by_the_router_alone(machine: ExportMachine) -> None:
    lease(machine)
    assert sent(machine.enough(KEY, 0)) == []
    machine.received(1, Release(KEY), 1)
    assert not machine.num_leases
    (revoke,) = sent(machine.received(1, Claim(KEY), 2))
    assert isinstance(revoke, Revoke), "a claim that comes too late is answered all the same"


def test_a_claim_after_an_end_by_the_first_token_is_left_to_the_router(
    machine: ExportMachine,
) -> None:
    machine.submitted(KEY, "D", 6, 0)
    machine.progressed(KEY, [5], 0)
    (freed,) = machine.enough(KEY, 0)
    assert freed == FreeBlocks(KEY, (5,))
    assert machine.received(1, Claim(KEY), 1) == []
    assert machine.received(1, Release(KEY), 2) == []


@pytest.mark.parametrize(
    "hello",
    [
        make_hello("D", digest=b"another"),
        make_hello("D", layout=replace(LAYOUT, block_size=8)),
        make_hello("D", transport="nixl"),
        replace(make_hello("D"), protocol=0),
    ],
)
def test_hello_that_does_not_fit_is_refused(machine: ExportMachine, hello: object) -> None:
    machine.link_opened(2)
    refused, close = machine.received(2, hello, 0)  # type: ignore[arg-type]
    assert isinstance(refused, Send) and isinstance(refused.message, Refused)
    assert isinstance(close, CloseLink)


def test_message_before_hello_ends_the_link(machine: ExportMachine) -> None:
    machine.link_opened(2)
    assert isinstance(machine.received(2, Claim(KEY), 0)[0], CloseLink)
    assert machine.received(2, Claim(KEY), 0) == []


def test_claim_after_submit_gets_offer_and_what_is_done_so_far(machine: ExportMachine) -> None:
    machine.submitted(KEY, "D", 6, 0)
    assert machine.progressed(KEY, [5], 0) == []
    assert sent(machine.received(1, Claim(KEY), 0)) == [Offer(KEY, 1, 6), Progress(1, 0, (5,))]
    assert sent(machine.progressed(KEY, [9], 0)) == [Progress(1, 1, (9,))]
    assert sent(machine.committed(KEY, 42, None, 4, 0)) == [make_commit()]


def test_claim_before_submit_is_offered_when_the_request_comes(machine: ExportMachine) -> None:
    assert machine.received(1, Claim(KEY), 0) == []
    assert sent(machine.submitted(KEY, "D", 6, 1)) == [Offer(KEY, 1, 6)]


def test_claim_after_commit_gets_everything_at_once(machine: ExportMachine) -> None:
    machine.submitted(KEY, "D", 6, 0)
    assert finish(machine) == []
    expected = [Offer(KEY, 1, 6), Progress(1, 0, (5, 9)), make_commit()]
    assert sent(machine.received(1, Claim(KEY), 0)) == expected


def test_claim_by_another_worker_is_revoked_and_does_not_spoil_the_right_one(
    machine: ExportMachine,
) -> None:
    machine.link_opened(2)
    machine.received(2, make_hello("thief"), 0)
    machine.received(2, Claim(KEY), 0)
    machine.received(1, Claim(KEY), 0)
    actions = machine.submitted(KEY, "D", 6, 0)
    by_link = {a.link: type(a.message) for a in actions if isinstance(a, Send)}
    assert by_link == {1: Offer, 2: Revoke}


def test_release_frees_the_blocks_once(machine: ExportMachine) -> None:
    lease(machine)
    finish(machine)
    assert machine.num_held_blocks == 2
    assert machine.received(1, Release(KEY), 1) == [FreeBlocks(KEY, (5, 9))]
    assert machine.received(1, Release(KEY), 1) == []
    assert machine.num_leases == machine.num_held_blocks == 0
    assert machine.counters["late_release"] == 1


def test_release_before_commit_cancels_the_prefill(machine: ExportMachine) -> None:
    lease(machine)
    machine.progressed(KEY, [5], 0)
    free, cancel = machine.received(1, Release(KEY), 1)
    assert free == FreeBlocks(KEY, (5,))
    assert isinstance(cancel, CancelPrefill)
    assert machine.progressed(KEY, [9], 1) == [FreeBlocks(KEY, (9,))]
    assert machine.committed(KEY, 42, None, 0, 1) == []


def test_release_of_an_early_claim_cancels_the_prefill_when_it_comes(
    machine: ExportMachine,
) -> None:
    machine.received(1, Claim(KEY), 0)
    assert machine.received(1, Release(KEY), 0) == []
    assert isinstance(machine.submitted(KEY, "D", 6, 0)[0], CancelPrefill)
    assert machine.num_leases == 0


def test_release_on_another_link_ends_nothing(machine: ExportMachine) -> None:
    lease(machine)
    machine.link_opened(2)
    machine.received(2, make_hello("D"), 0)
    assert machine.received(2, Release(KEY), 0) == []
    assert machine.num_leases == 1


def test_lease_expires_ttl_after_the_latest_renew(machine: ExportMachine) -> None:
    lease(machine)
    finish(machine)
    assert sent(machine.received(1, Renew(1), 8)) == [Renewed(1)]
    assert machine.received(1, Renew(1), 9) == []
    assert machine.expire(8 + TTL - 0.01) == []
    free, revoke = machine.expire(8 + TTL)
    assert free == FreeBlocks(KEY, (5, 9))
    assert isinstance(revoke, Send) and isinstance(revoke.message, Revoke)


def test_renew_revives_a_lease_that_was_not_ended_yet(machine: ExportMachine) -> None:
    lease(machine)
    machine.received(1, Renew(1), TTL + 5)
    assert machine.expire(TTL + 5) == []


def test_lease_that_expires_under_computation_cancels_it(machine: ExportMachine) -> None:
    lease(machine)
    assert [type(a) for a in machine.expire(TTL)] == [CancelPrefill, Send]


def test_unclaimed_prompt_lives_while_it_is_computed_and_a_ttl_longer(
    machine: ExportMachine,
) -> None:
    machine.submitted(KEY, "D", 6, 0)
    assert machine.expire(1000) == []
    finish(machine, 1000)
    assert machine.expire(1000 + TTL - 1) == []
    assert machine.expire(1000 + TTL) == [FreeBlocks(KEY, (5, 9))]


def test_unclaimed_prompt_ends_with_its_router_and_a_claimed_one_does_not(
    machine: ExportMachine,
) -> None:
    machine.submitted(KEY, "D", 6, 0, router=7)
    assert machine.router_left(7) == [], "what is computed fails by itself"
    finish(machine)
    assert machine.router_left(8) == machine.withdrawn(KEY, 8) == []
    assert machine.router_left(7) == [FreeBlocks(KEY, (5, 9))]
    (revoke,) = sent(machine.received(1, Claim(KEY), 0))
    assert isinstance(revoke, Revoke) and not machine.num_leases
    other = Key("other", 1)
    machine.submitted(other, "D", 6, 0, router=7)
    machine.received(1, Claim(other), 0)
    machine.progressed(other, [5, 9], 0)
    machine.committed(other, 42, None, 4, 0)
    assert machine.router_left(7) == machine.withdrawn(other, 7) == []


def test_failure_frees_an_unclaimed_prompt_and_answers_a_later_claim(
    machine: ExportMachine,
) -> None:
    machine.submitted(KEY, "D", 6, 0)
    machine.progressed(KEY, [5], 0)
    assert machine.failed(KEY, ErrorCode.OVERLOADED, "why", 0) == [FreeBlocks(KEY, (5,))]
    assert sent(machine.received(1, Claim(KEY), 0)) == [Revoke(KEY, "overloaded", "why")]


def test_failure_of_a_leased_prompt_revokes_it_and_keeps_the_blocks(
    machine: ExportMachine,
) -> None:
    lease(machine)
    finish(machine)
    assert machine.failed(KEY, LOST, "abort", 1) == [Send(1, Revoke(KEY, LOST, "abort"))]
    assert machine.failed(KEY, LOST, "again", 1) == []
    assert machine.num_held_blocks == 2
    assert machine.received(1, Release(KEY), 2) == [FreeBlocks(KEY, (5, 9))]


def test_failure_before_submit_revokes_the_early_claim(machine: ExportMachine) -> None:
    machine.received(1, Claim(KEY), 0)
    assert sent(machine.failed(KEY, LOST, "full", 0)) == [Revoke(KEY, LOST, "full")]


def test_commit_with_missing_blocks_is_revoked(machine: ExportMachine) -> None:
    lease(machine)
    machine.progressed(KEY, [5], 0)
    (revoke,) = sent(machine.committed(KEY, 42, None, 0, 0))
    assert isinstance(revoke, Revoke) and revoke.error_code == ErrorCode.INTERNAL


def test_closed_link_keeps_blocks_until_ttl_and_cancels_what_is_computed(
    machine: ExportMachine,
) -> None:
    lease(machine)
    machine.progressed(KEY, [5], 0)
    machine.received(1, Renew(1), 3)
    (cancel,) = machine.link_closed(1, 4)
    assert isinstance(cancel, CancelPrefill) and cancel.code is ErrorCode.WORKER_LOST
    assert machine.failed(KEY, LOST, "", 5) == []
    assert machine.expire(3 + TTL - 0.1) == []
    assert machine.expire(3 + TTL) == [FreeBlocks(KEY, (5,))]


def test_early_claims_are_bounded_and_expire(machine: ExportMachine) -> None:
    keys = [KEY._replace(attempt=i) for i in range(3)]
    answers = [sent(machine.received(1, Claim(key), 0)) for key in keys]
    assert answers[:2] == [[], []]
    assert isinstance(answers[2][0], Revoke)
    assert machine.expire(TTL - 0.1) == []
    revoked = sent(machine.expire(TTL))
    assert [revoke.key for revoke in revoked if isinstance(revoke, Revoke)] == keys[:2]
    assert isinstance(machine.submitted(keys[0], "D", 6, TTL)[0], CancelPrefill)


def test_endings_are_forgotten_oldest_first(machine: ExportMachine) -> None:
    keys = [KEY._replace(attempt=i) for i in range(4)]
    for key in keys:
        machine.failed(key, LOST, "", 0)
    assert machine.received(1, Claim(keys[0]), 0) == []
    assert sent(machine.received(1, Claim(keys[3]), 0))


def test_lease_kept_too_long_closes_the_link_but_frees_nothing_early(
    machine: ExportMachine,
) -> None:
    lease(machine)
    finish(machine)
    machine.received(1, Renew(1), 599)
    assert [type(action) for action in machine.expire(600)] == [CloseLink]
    assert machine.num_held_blocks == 2
    assert machine.received(1, Renew(2), 601) == []
    assert machine.expire(599 + TTL) == [FreeBlocks(KEY, (5, 9))]


def test_duplicates_are_counted_and_ignored(machine: ExportMachine) -> None:
    lease(machine)
    assert machine.submitted(KEY, "D", 6, 0) == []
    assert machine.received(1, Claim(KEY), 0) == []
    machine.received(1, Claim(OTHER), 0)
    assert machine.received(1, Claim(OTHER), 0) == []
    assert machine.counters["duplicate_submit"] == 1
    assert machine.counters["duplicate_claim"] == 2
