"""A new link carries a test block first: what it brings decides whether prompts follow."""

import logging

import pytest

from core.errors import TransferError
from rpc.v1 import worker_pb2
from tests.support.fake_executor import undisturbed
from tests.support.loops import FakeStamps, Pair

PROMPT = list(range(1, 31))


def new_pair(faults: str = "") -> Pair:
    return Pair(num_blocks=64, test_links=True, faults=faults)


def link_of(pair: Pair) -> worker_pb2.LinkRate | None:
    """What routers are told of the link."""
    loads = [event.heartbeat.load for event in pair.decode.pipe.sent if event.HasField("heartbeat")]
    return next(iter(loads[-1].links), None)


def failing(pair: Pair) -> float | None:
    labels = {"peer": "prefill", "transport": "copy"}
    return pair.decode.registry.get_sample_value("diptych_kv_link_failing", labels)


def served(pair: Pair, request_id: str = "r", turns: int = 200) -> bool:
    """Submit a prompt: True if its output is right, False if its hand-over failed."""
    params = pair.submit(PROMPT, request_id=request_id)
    for _ in range(turns):
        pair.turn()
        if pair.decode.finished(request_id):
            break
    pair.settle(30)
    (end,) = pair.decode.finished(request_id)
    assert pair.prefill.balanced and pair.decode.balanced
    if end.reason == worker_pb2.FINISH_REASON_FAILED:
        assert end.error_code == "kv_transfer_failed"
        assert pair.decode.tokens(request_id) == []
        return False
    assert pair.decode.tokens(request_id) == undisturbed(PROMPT, params)
    return True


def reads(pair: Pair) -> float:
    labels = {"peer": "prefill", "transport": "copy"}
    name = "diptych_kv_link_read_bytes_total"
    return (pair.decode.registry.get_sample_value(name, labels) or 0) / 8


def test_a_test_block_comes_before_the_first_prompt_and_only_then() -> None:
    pair = new_pair()
    assert served(pair)
    assert failing(pair) == 0
    link = link_of(pair)
    assert link is not None and not link.failure
    after_one = reads(pair)
    assert after_one == 1 + 8  # the test's block and the prompt's
    assert served(pair, "r2")
    assert reads(pair) <= after_one + 8


# Met elsewhere: requests ran on decode alone for days: no KV ever moved, and nothing said so.
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ("kv.stamp:corrupt", "other bytes than were sent"),
        ("kv.read:fail", "injected fault kv.read:fail"),
        ("kv.probe:lost", "No test block came from prefill"),
    ],
)
def test_nothing_is_read_over_a_link_whose_test_fails_and_routers_are_told(
    faults: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = new_pair(faults)
    assert not served(pair, turns=1500)
    link = link_of(pair)
    assert link is not None and reason in link.failure
    assert (link.prefill_worker_id, link.prefill_epoch) == ("prefill", 7)
    assert failing(pair) == 1
    assert reads(pair) <= 1
    (line,) = {each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR}
    assert "KV does not move from prefill worker prefill" in line and reason in line


def test_a_failed_test_is_repeated_without_a_prompt_until_it_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pair = new_pair("kv.stamp:corrupt@0.5;seed=3")  # strikes twice, then not
    assert not served(pair)
    for _ in range(500):
        pair.turn()
        if not failing(pair):
            break
    failures = [line for line in caplog.messages if "does not move" in line]
    assert len(failures) == 2
    assert caplog.messages[-1] == "KV moves from prefill worker prefill by copy"
    pair.settle(30)
    link = link_of(pair)
    assert link is None or not link.failure
    assert served(pair, "r2")


def test_tests_of_a_pair_that_goes_on_failing_become_rare(caplog: pytest.LogCaptureFixture) -> None:
    pair = new_pair("kv.stamp:corrupt")
    assert not served(pair)
    pair.settle(6000)  # a minute
    assert 4 <= len([line for line in caplog.messages if "does not move" in line]) <= 7
    assert pair.prefill.balanced and pair.decode.balanced


def test_a_worker_that_is_gone_is_not_tested_for_ever() -> None:
    pair = new_pair("kv.stamp:corrupt")
    assert not served(pair)
    for _ in range(2000):  # whoever opens a link hears that nobody is there
        pair.turn()
        pair.cut()
    assert failing(pair) is None
    link = link_of(pair)
    assert link is None or not link.failure


def test_a_link_goes_untested_where_no_block_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = new_pair()
    with monkeypatch.context() as patch:
        patch.setattr(pair.prefill.engine, "reserve", lambda request: None)
        assert served(pair)
    assert reads(pair) == 8


@pytest.mark.parametrize("method", ["write", "holds"])
def test_a_pool_that_can_not_be_looked_into_says_nothing_against_a_link(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> bool:
        raise TransferError("no context")

    pair = new_pair()
    monkeypatch.setattr(FakeStamps, method, refuse)
    assert served(pair)
    assert "no context" in caplog.text


@pytest.mark.parametrize("turn", range(1, 14))
def test_whatever_is_cut_short_leaves_nothing_behind(turn: int) -> None:
    pair = new_pair()
    params = pair.submit(PROMPT)
    for _ in range(turn):
        pair.turn()
    if turn % 2:
        pair.abort()
    else:
        pair.cut()
    pair.settle(60)
    pair.clock.now += 20
    pair.settle(20)
    known = pair.decode.tokens()
    assert known == undisturbed(PROMPT, params)[: len(known)]
    assert pair.prefill.balanced and pair.decode.balanced
