"""Decode's half of the hand-over, event by event."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from core.errors import ErrorCode
from kvtransfer.actions import (
    CloseLink,
    ConnectPeer,
    Deliver,
    DisconnectPeer,
    DropBlocks,
    Fail,
    HandoverAction,
    OpenLink,
    Reserve,
    Send,
    StartRead,
)
from kvtransfer.handover import HandoverMachine
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.messages import (
    Claim,
    Commit,
    Key,
    Offer,
    Progress,
    Refused,
    Release,
    Renew,
    Renewed,
    Revoke,
)
from tests.support.kv_messages import EPOCH, KEY, LAYOUT, make_commit, make_hello

OTHER = Key("s", 0)
CONFIG = HandoverConfig(
    drift_ratio=0.1,
    read_margin_s=1.0,
    peer_silence_s=6.0,
    open_timeout_s=5.0,
    read_timeout_s=4.0,
    idle_link_s=60.0,
    max_inflight_blocks=3,
)


@pytest.fixture
def machine() -> HandoverMachine:
    return HandoverMachine(make_hello("D", ttl_s=0), CONFIG)


def submit(
    machine: HandoverMachine, key: Key = KEY, *, num_tokens: int = 6, deadline: float = 100
) -> list[HandoverAction]:
    return machine.submitted(
        key,
        worker_id="P",
        epoch=EPOCH,
        address="host:1",
        num_tokens=num_tokens,
        deadline=deadline,
        now=0,
    )


def offered(machine: HandoverMachine) -> None:
    """A hand-over of 6 tokens, two blocks, whose lease is known and valid until 9."""
    submit(machine)
    machine.received(1, make_hello(), 0)
    machine.received(1, Renewed(1), 0.5)
    machine.received(1, Offer(KEY, 1, 6), 0.5)


def reading(machine: HandoverMachine) -> None:
    """And its only READ is pending, with everything else in place."""
    offered(machine)
    machine.received(1, Progress(1, 0, (50, 60)), 1)
    machine.reserved(KEY, (7, 8), 0, 1)


def kinds(actions: Sequence[HandoverAction]) -> list[type]:
    return [type(action) for action in actions]


def sent(actions: Sequence[HandoverAction]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Send)]


def failure(actions: Sequence[HandoverAction]) -> Fail:
    (fail,) = [action for action in actions if isinstance(action, Fail)]
    return fail


def test_first_submit_opens_a_link_that_later_ones_share(machine: HandoverMachine) -> None:
    assert submit(machine) == [OpenLink(1, "host:1"), Send(1, make_hello("D", ttl_s=0))]
    assert submit(machine, OTHER) == []
    actions = machine.received(1, make_hello(), 0)
    assert sent(actions) == [Renew(1), Claim(KEY), Claim(OTHER)]
    assert ConnectPeer(1, f"P/{EPOCH:x}/1", make_hello()) in actions
    assert sent(submit(machine, Key("t", 0))) == [Claim(Key("t", 0))]
    assert submit(machine) == []


def test_whole_course_delivers_and_releases(machine: HandoverMachine) -> None:
    offered(machine)
    assert machine.received(1, Progress(1, 0, (50,)), 1) == [Reserve(KEY)]
    assert machine.reserved(KEY, (7, 8, 9), 0, 1) == [
        StartRead(KEY, 1, f"P/{EPOCH:x}/1", ((50, 7),))
    ]
    assert machine.received(1, Progress(1, 1, (60,)), 2) == []
    assert machine.received(1, make_commit(), 2) == []
    assert machine.read_done(KEY, 1, 2.5) == [StartRead(KEY, 2, f"P/{EPOCH:x}/1", ((60, 8),))]
    assert machine.read_done(KEY, 2, 3) == [
        Deliver(
            key=KEY,
            first_token=42,
            logprobs=None,
            prefill_cached_tokens=4,
            num_read_blocks=2,
            transfer_s=1.0,
        ),
        Send(1, Release(KEY)),
    ]
    assert machine.num_handovers == machine.num_inflight_blocks == 0


def test_cached_leading_blocks_are_not_read(machine: HandoverMachine) -> None:
    offered(machine)
    machine.received(1, Progress(1, 0, (50, 60)), 1)
    (read,) = machine.reserved(KEY, (7, 8), 1, 1)
    assert isinstance(read, StartRead) and read.pairs == ((60, 8),)
    machine.received(1, make_commit(), 1)
    deliver = machine.read_done(KEY, 1, 2)[0]
    assert isinstance(deliver, Deliver) and deliver.num_read_blocks == 1


def test_commit_before_the_last_block_waits_for_it(machine: HandoverMachine) -> None:
    reading(machine)
    assert machine.received(1, make_commit(), 2) == []
    assert kinds(machine.read_done(KEY, 1, 3)) == [Deliver, Send]


def test_blocks_in_flight_are_bounded_and_shared_in_turn(machine: HandoverMachine) -> None:
    offered(machine)
    submit(machine, OTHER, num_tokens=16)
    machine.received(1, Offer(OTHER, 2, 16), 0.6)
    machine.received(1, Progress(2, 0, (1, 2, 3, 4)), 1)
    machine.received(1, Progress(1, 0, (50, 60)), 1)
    (first,) = machine.reserved(OTHER, (1, 2, 3, 4), 0, 1)
    assert isinstance(first, StartRead) and len(first.pairs) == 3
    assert machine.reserved(KEY, (7, 8), 0, 1) == []
    actions = machine.read_done(OTHER, 1, 2)
    assert [len(action.pairs) for action in actions if isinstance(action, StartRead)] == [2, 1]
    assert machine.num_inflight_blocks == 3


def test_no_read_starts_without_a_valid_lease(machine: HandoverMachine) -> None:
    submit(machine)
    machine.received(1, make_hello(), 0)
    machine.received(1, Offer(KEY, 1, 6), 0)
    machine.received(1, Progress(1, 0, (50, 60)), 0)
    assert machine.reserved(KEY, (7, 8), 0, 0) == []
    assert kinds(machine.received(1, Renewed(1), 1)) == [StartRead]


def test_no_read_starts_within_the_margin(machine: HandoverMachine) -> None:
    offered(machine)
    machine.received(1, Progress(1, 0, (50, 60)), 8.1)
    assert machine.reserved(KEY, (7, 8), 0, 8.1) == []


def test_read_that_ends_after_validity_is_not_delivered_without_proof(
    machine: HandoverMachine,
) -> None:
    # Met elsewhere: Prefill timed out and freed; decode read on: wrong output without an
    # error.
    reading(machine)
    machine.received(1, make_commit(), 2)
    assert machine.read_done(KEY, 1, 9.0) == []
    assert sent(machine.tick(9.5)) == [Renew(2)]
    assert failure(machine.received(1, Renewed(2), 9.6)).code is ErrorCode.KV_TRANSFER


def test_late_answer_to_an_early_renew_proves_the_lease(machine: HandoverMachine) -> None:
    reading(machine)
    assert sent(machine.tick(3)) == [Renew(2)]
    machine.received(1, make_commit(), 4)
    assert machine.read_done(KEY, 1, 9.0) == []
    assert kinds(machine.received(1, Renewed(2), 9.1)) == [Deliver, Send]


def test_gap_between_renews_fails_what_was_read(machine: HandoverMachine) -> None:
    reading(machine)
    machine.read_done(KEY, 1, 2)
    assert sent(machine.tick(9.5)) == [Renew(2)]
    machine.received(1, make_commit(), 9.6)
    actions = machine.received(1, Renewed(2), 9.7)
    assert failure(actions).code is ErrorCode.KV_TRANSFER
    assert kinds(actions) == [Fail, DropBlocks, Send]


@pytest.mark.parametrize(
    "commit",
    [
        make_commit(digest=b"another"),
        make_commit(epoch=EPOCH + 1),
        make_commit(num_tokens=7),
    ],
)
def test_commit_that_does_not_fit_fails(machine: HandoverMachine, commit: Commit) -> None:
    # Met elsewhere: Stale block ids were used again: status 200 with the previous prompt's
    # answer.
    reading(machine)
    assert failure(machine.received(1, commit, 2)).code is ErrorCode.KV_TRANSFER
    assert kinds(machine.read_done(KEY, 1, 3)) == [DropBlocks, Send]


def test_commit_without_all_blocks_fails(machine: HandoverMachine) -> None:
    # Met elsewhere: Prefill refused, and decode made garbage from half a cache or called it
    # a full answer.
    offered(machine)
    machine.received(1, Progress(1, 0, (50,)), 1)
    assert "blocks missing" in failure(machine.received(1, make_commit(), 2)).message


@pytest.mark.parametrize(
    "progress",
    [
        Progress(1, 1, (60,)),
        Progress(1, 0, (1, 2, 3)),
        Progress(1, 0, (100,)),
    ],
)
def test_progress_that_does_not_fit_fails(machine: HandoverMachine, progress: Progress) -> None:
    offered(machine)
    assert failure(machine.received(1, progress, 1)).code is ErrorCode.KV_TRANSFER


def test_offer_of_another_length_fails(machine: HandoverMachine) -> None:
    submit(machine)
    machine.received(1, make_hello(), 0)
    assert failure(machine.received(1, Offer(KEY, 1, 7), 0))


@pytest.mark.parametrize(
    "hello",
    [
        make_hello("Q"),
        make_hello(epoch=EPOCH + 1),
        make_hello(digest=b"another"),
        make_hello(layout=replace(LAYOUT, dtype="bfloat16")),
        replace(make_hello(), protocol=0),
        make_hello(transport="nixl"),
        make_hello(ttl_s=1.0),
    ],
)
def test_hello_that_does_not_fit_fails_and_closes(machine: HandoverMachine, hello: object) -> None:
    submit(machine)
    actions = machine.received(1, hello, 0)  # type: ignore[arg-type]
    assert kinds(actions) == [Fail, CloseLink]
    assert machine.num_links == 0


def test_refusal_fails_with_its_reason(machine: HandoverMachine) -> None:
    submit(machine)
    assert failure(machine.received(1, Refused("no room"), 0)).message == "no room"


def test_revoke_fails_at_once_and_releases_after_the_read(machine: HandoverMachine) -> None:
    # Met elsewhere: An abort by prefill was never told: decode waited out 300 s, request
    # after request.
    reading(machine)
    actions = machine.received(1, Revoke(KEY, "overloaded", "why"), 2)
    assert actions == [Fail(KEY, ErrorCode.OVERLOADED, "why")]
    assert machine.read_done(KEY, 1, 3) == [DropBlocks(KEY), Send(1, Release(KEY))]


def test_revoke_of_unknown_code_is_a_transfer_failure(machine: HandoverMachine) -> None:
    offered(machine)
    actions = machine.received(1, Revoke(KEY, "gibberish", ""), 2)
    assert failure(actions).code is ErrorCode.KV_TRANSFER


def test_abort_is_silent_and_keeps_blocks_until_the_read_ends(machine: HandoverMachine) -> None:
    reading(machine)
    assert machine.aborted(KEY, 2) == []
    assert machine.aborted(KEY, 2) == []
    assert machine.received(1, make_commit(), 2) == []
    assert machine.read_done(KEY, 1, 3) == [DropBlocks(KEY), Send(1, Release(KEY))]


def test_abort_before_the_link_is_up_leaves_nothing(machine: HandoverMachine) -> None:
    submit(machine)
    assert machine.aborted(KEY, 0) == []
    assert sent(machine.received(1, make_hello(), 0)) == [Renew(1)]


def test_abort_while_waiting_for_room_cancels_the_reservation(machine: HandoverMachine) -> None:
    offered(machine)
    machine.received(1, Progress(1, 0, (50,)), 1)
    assert machine.aborted(KEY, 2) == [DropBlocks(KEY), Send(1, Release(KEY))]
    assert machine.reserved(KEY, (7, 8), 0, 2) == [DropBlocks(KEY)]


def test_failed_read_drops_the_peer_and_everything_on_it(machine: HandoverMachine) -> None:
    # Met elsewhere: A write that was not posted left decode counting to a number that never
    # came.
    reading(machine)
    submit(machine, OTHER)
    actions = machine.read_failed(KEY, 1, "reset", 2)
    assert kinds(actions) == [DisconnectPeer, Fail, DropBlocks, Send, Fail, Send, CloseLink]
    assert machine.num_handovers == machine.num_links == 0
    assert machine.read_done(KEY, 1, 3) == []


def test_stuck_read_disconnects_the_peer(machine: HandoverMachine) -> None:
    reading(machine)
    machine.received(1, Renewed(2), 4.9)
    assert DisconnectPeer(f"P/{EPOCH:x}/1") not in machine.tick(4.9)
    actions = machine.tick(5)
    assert kinds(actions) == [DisconnectPeer, Fail, DropBlocks, Send, CloseLink]


def test_peer_that_can_not_be_connected_fails(machine: HandoverMachine) -> None:
    offered(machine)
    assert "no route" in failure(machine.peer_failed(1, "no route", 1)).message


def test_closed_link_fails_without_a_word_on_it(machine: HandoverMachine) -> None:
    reading(machine)
    actions = machine.link_closed(1, "reset", 2)
    assert kinds(actions) == [DisconnectPeer, Fail, DropBlocks]
    assert failure(actions).code is ErrorCode.WORKER_LOST
    assert machine.received(1, make_commit(), 2) == []
    assert machine.link_closed(1, "reset", 2) == []
    assert submit(machine, OTHER)[0] == OpenLink(2, "host:1")


def test_link_without_hello_is_given_up(machine: HandoverMachine) -> None:
    # Met elsewhere: An aborted load held decode blocks for ever when prefill never
    # reported.
    submit(machine)
    assert machine.tick(4.9) == []
    assert failure(machine.tick(5)).code is ErrorCode.WORKER_LOST


def test_renews_are_sent_and_silence_ends_the_link(machine: HandoverMachine) -> None:
    offered(machine)
    assert machine.tick(1.9) == []
    assert sent(machine.tick(2)) == [Renew(2)]
    assert sent(machine.tick(7.9)) == [Renew(3)]
    assert failure(machine.tick(8)).code is ErrorCode.WORKER_LOST


def test_own_long_step_is_not_taken_for_silence(machine: HandoverMachine) -> None:
    offered(machine)
    assert sent(machine.tick(50)) == [Renew(2)]
    assert machine.num_links == 1


def test_idle_link_is_closed(machine: HandoverMachine) -> None:
    submit(machine)
    machine.received(1, make_hello(), 0)
    machine.aborted(KEY, 1)
    now, seq = 0.0, 1
    while now < 60.9:
        machine.received(1, Renewed(seq), now)
        seq += len(sent(machine.tick(now)))
        now += 0.5
        assert machine.num_links == 1
    assert kinds(machine.tick(61)) == [DisconnectPeer, CloseLink]


def test_deadline_fails_the_hand_over(machine: HandoverMachine) -> None:
    submit(machine, deadline=3)
    assert machine.tick(2.9) == []
    assert failure(machine.tick(3)).code is ErrorCode.DEADLINE


def test_engine_refusal_fails_with_its_cause(machine: HandoverMachine) -> None:
    offered(machine)
    machine.received(1, Progress(1, 0, (50,)), 1)
    actions = machine.failed(KEY, ErrorCode.CONTEXT_LENGTH, "too long", 1)
    assert actions[0] == Fail(KEY, ErrorCode.CONTEXT_LENGTH, "too long")


def test_messages_of_ended_keys_are_counted_and_ignored(machine: HandoverMachine) -> None:
    offered(machine)
    machine.aborted(KEY, 1)
    late = [Offer(KEY, 1, 6), Progress(1, 0, (50,)), make_commit(), Revoke(KEY, "", ""), Renewed(9)]
    for message in late:
        assert machine.received(1, message, 1) == []
    assert sum(machine.counters.values()) == len(late)
