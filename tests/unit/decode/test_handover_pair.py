"""Exporter and importer joined: KV moves, and whatever is cut short leaves nothing behind."""

from functools import partial
from typing import Protocol

import pytest

from core.errors import RETRYABLE
from engine.executor import ExecutorLostError
from kvtransfer.rank_transport import RankTransport
from rpc.v1 import ipc_pb2, worker_pb2
from tests.support.fake_executor import undisturbed
from tests.support.grammar import BAD, HeldCompiler, ready_compiler, structure
from tests.support.loops import COPY_S, LEASE_TTL_S, Pair

PROMPT = list(range(1, 31))
TURNS_OF_A_HANDOVER = 24


class MakePair(Protocol):
    def __call__(
        self,
        *,
        num_blocks: int = 16,
        probe_blocks: int = 0,
        num_host_blocks: int = 0,
        **config: object,
    ) -> Pair: ...


@pytest.fixture(params=[False, True], ids=["in_turn", "ahead"])
def make_pair(request: pytest.FixtureRequest) -> MakePair:
    """Builds pairs whose engines plan ahead of a step in flight, and others."""
    return partial(Pair, overlaps=request.param)


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 64])
def test_decode_goes_on_where_prefill_ended(make_pair: MakePair, chunk: int) -> None:
    pair = make_pair(max_step_tokens=max(16, chunk), max_chunk_tokens=chunk)
    params = pair.submit(PROMPT, seed=3)
    pair.run()
    pair.settle()
    expected = undisturbed(PROMPT, params)
    assert pair.decode.tokens() == expected
    assert pair.prefill.tokens() == expected[:1]
    (handed_over,) = pair.prefill.finished()
    assert handed_over.reason == worker_pb2.FINISH_REASON_HANDED_OVER
    (end,) = pair.decode.finished()
    assert end.reason == worker_pb2.FINISH_REASON_LENGTH
    assert end.kv_bytes == 8 * 8
    assert pair.prefill.balanced
    assert pair.decode.balanced


def test_decode_computes_no_prompt_token_itself(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.submit(PROMPT)
    pair.run()
    lengths = {len(c.token_ids) for plan in pair.decode.executor.plans for c in plan.chunks}
    assert lengths == {1}


def test_room_that_a_prompt_on_its_way_will_take_is_reported(make_pair: MakePair) -> None:
    """Until it has it; a router that did not know would send decode more than fits."""
    pair = make_pair(max_chunk_tokens=4)
    pair.submit(PROMPT)
    seen = set()
    while not pair.decode.tokens():
        pair.turn()
        load = worker_pb2.LoadReport()
        pair.decode.role.report(load)
        seen.add((load.awaited_blocks, pair.decode.engine.stats().held_blocks))
    assert {(8, 0), (0, 8)} <= seen and len(seen) <= 3
    pair.submit(PROMPT, request_id="next")
    pair.turn()
    pair.decode.role.report(load)
    assert load.awaited_blocks == 8
    pair.cut()
    pair.settle()
    pair.decode.role.report(load)
    assert load.awaited_blocks == 0


def test_blocks_move_while_prefill_still_computes(make_pair: MakePair) -> None:
    pair = make_pair(max_chunk_tokens=4)
    pair.submit(PROMPT)
    for _ in range(TURNS_OF_A_HANDOVER):
        pair.turn()
        if any(block[0] != -1 for block in pair.decode.executor.pool.blocks):
            break
    assert not pair.prefill.finished()


def test_what_decode_has_cached_is_not_moved_again(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.submit(PROMPT)
    pair.run()
    pair.settle()
    params = pair.submit(PROMPT, request_id="r2")
    pair.settle(60)
    assert pair.decode.tokens("r2") == undisturbed(PROMPT, params)
    (end,) = pair.decode.finished("r2")
    assert end.kv_bytes == 8  # the last, partial block is never cached
    assert end.cached_tokens == 28


def test_blocks_that_came_back_from_host_memory_are_exported_and_imported_over(
    make_pair: MakePair,
) -> None:
    """On prefill they are leased like any others; decode reads none that its own host has."""
    pair = make_pair(num_blocks=14, num_host_blocks=40)
    kv_bytes = []
    for number in range(9):
        name, prompt = f"r{number}", [1 + number % 3, *PROMPT[1:]]
        params = pair.submit(prompt, request_id=name, seed=number)
        pair.settle(40)
        assert pair.decode.tokens(name) == undisturbed(prompt, params)
        (end,) = pair.decode.finished(name)
        kv_bytes.append(end.kv_bytes)
    for side in (pair.prefill, pair.decode):
        assert side.balanced
        assert side.engine.stats().host.hit_tokens > 0
    assert set(kv_bytes[:3]) == {8 * 8} and max(kv_bytes[3:]) < 8 * 8


@pytest.mark.parametrize("turn", range(TURNS_OF_A_HANDOVER))
def test_aborted_at_any_turn_both_pools_balance(make_pair: MakePair, turn: int) -> None:
    pair = make_pair(max_chunk_tokens=4)
    pair.submit(PROMPT)
    for _ in range(turn):
        pair.turn()
    pair.abort()
    pair.settle()
    assert pair.prefill.balanced
    assert pair.decode.balanced


@pytest.mark.parametrize("turn", range(TURNS_OF_A_HANDOVER))
def test_link_cut_at_any_turn_never_gives_a_wrong_token(make_pair: MakePair, turn: int) -> None:
    pair = make_pair(max_chunk_tokens=4)
    params = pair.submit(PROMPT, seed=5)
    for _ in range(turn):
        pair.turn()
    pair.cut()
    pair.settle(40)
    (end,) = pair.decode.finished()
    expected = undisturbed(PROMPT, params)
    if end.reason == worker_pb2.FINISH_REASON_FAILED:
        assert end.error_code == "kv_transfer_failed"
    assert pair.decode.tokens() == expected[: len(pair.decode.tokens())]
    assert pair.decode.balanced
    pair.clock.now += LEASE_TTL_S + 1
    pair.settle(3)
    assert pair.prefill.balanced


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_lost_rank_ends_the_loop_even_with_nothing_to_compute(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: RankTransport) -> None:
        raise ExecutorLostError("rank 1 is gone")

    pair = Pair()
    side = getattr(pair, name)
    pair.settle(2)
    monkeypatch.setattr(RankTransport, "check", lost)
    with pytest.raises(ExecutorLostError, match="rank 1 is gone"):
        side.loop.turn()


def test_a_first_token_that_ends_the_request_ends_it_on_both_sides(make_pair: MakePair) -> None:
    pair = make_pair()
    params = pair.submit(PROMPT, max_tokens=1)
    pair.settle(40)
    assert pair.prefill.tokens() == undisturbed(PROMPT, params)
    (end,) = pair.prefill.finished()
    assert end.reason == worker_pb2.FINISH_REASON_LENGTH
    pair.abort()
    pair.settle()
    assert pair.prefill.balanced
    assert pair.decode.balanced


def test_many_prompts_through_pools_that_hold_few(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=24)
    wanted = {}
    for i in range(12):
        prompt = list(range(1 + i, 8 + 3 * i))
        name = f"r{i}"
        wanted[name] = undisturbed(prompt, pair.submit(prompt, request_id=name, seed=i))
    pair.settle(400)
    assert {name: pair.decode.tokens(name) for name in wanted} == wanted
    assert pair.prefill.balanced
    assert pair.decode.balanced


def test_frozen_prefill_is_given_up_and_its_blocks_are_not_used(make_pair: MakePair) -> None:
    pair = make_pair(max_chunk_tokens=4)
    pair.submit(PROMPT)
    for _ in range(6):
        pair.turn()
    for _ in range(40):  # prefill does not turn any more
        pair.decode.loop.turn()
        pair.relay()
        pair.clock.now += 0.5
    (end,) = pair.decode.finished()
    assert end.reason == worker_pb2.FINISH_REASON_FAILED
    assert end.error_code == "kv_transfer_failed", "decode itself is not lost"
    assert pair.decode.balanced
    pair.settle()
    pair.clock.now += LEASE_TTL_S + 1
    pair.settle(3)
    assert pair.prefill.balanced


def test_a_pair_that_could_use_nixl_says_so(
    make_pair: MakePair, caplog: pytest.LogCaptureFixture
) -> None:
    pair = make_pair()
    pair.submit(PROMPT)
    pair.settle(40)
    assert len([line for line in caplog.messages if "could use NIXL" in line]) == 1


def probe_ends(pair: Pair) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for metric in pair.decode.registry.collect()
        for sample in metric.samples
        if sample.name == "diptych_kv_link_probes_total" and sample.value
    }


def link_rate(pair: Pair) -> float | None:
    labels = {"peer": "prefill", "transport": "copy"}
    return pair.decode.registry.get_sample_value("diptych_kv_link_bytes_per_second", labels)


def idle_link(make_pair: MakePair) -> Pair:
    """A pair whose link has just become unused: decode generates after a prompt of one block."""
    pair = make_pair(num_blocks=256, probe_blocks=8)
    pair.submit([1, 2, 3])
    while not pair.decode.tokens():
        pair.turn()
    return pair


def test_an_unused_link_is_measured_once_and_routers_are_told(make_pair: MakePair) -> None:
    pair = idle_link(make_pair)
    pair.settle(60)
    assert probe_ends(pair) == {"measured": 1}
    assert link_rate(pair) == pytest.approx(4 * 8 / COPY_S)  # the largest READ moves half of all
    (link,) = [event.heartbeat.load for event in pair.decode.pipe.sent][-1].links or [None]
    assert link is not None
    assert (link.prefill_worker_id, link.bytes_per_s) == ("prefill", link_rate(pair))
    assert pair.prefill.balanced
    assert pair.decode.balanced


@pytest.mark.parametrize("turn", range(9))
def test_a_prompt_preempts_the_probe_and_loses_nothing(make_pair: MakePair, turn: int) -> None:
    pair = idle_link(make_pair)
    for _ in range(turn):
        pair.turn()
    params = pair.submit(PROMPT, request_id="r2")
    pair.settle(80)
    assert pair.decode.tokens("r2") == undisturbed(PROMPT, params)
    assert probe_ends(pair) == {"preempted": 1}
    assert pair.prefill.balanced
    assert pair.decode.balanced


def test_a_link_whose_probe_was_cut_short_is_measured_soon_and_then_not_for_long(
    make_pair: MakePair,
) -> None:
    pair = idle_link(make_pair)
    for _ in range(3):
        pair.turn()
    pair.submit(PROMPT, request_id="r2")
    pair.settle(80)
    assert probe_ends(pair) == {"preempted": 1}
    for _ in range(2):
        for _ in range(6):  # in steps, or the link's leases would lapse
            pair.clock.now += 1
            pair.settle(5)
        assert probe_ends(pair) == {"preempted": 1, "measured": 1}
    assert pair.prefill.balanced
    assert pair.decode.balanced


@pytest.mark.parametrize("turn", range(1, 12))
def test_a_peer_frozen_in_a_probe_leaks_nothing(make_pair: MakePair, turn: int) -> None:
    pair = idle_link(make_pair)
    for _ in range(turn):
        pair.turn()
    for _ in range(40):  # prefill does not turn any more
        pair.decode.loop.turn()
        pair.relay()
        pair.clock.now += 0.5
    assert not pair.decode.role.leases
    assert link_rate(pair) is None
    pair.settle()
    pair.clock.now += LEASE_TTL_S + 1
    pair.settle(3)
    assert pair.prefill.balanced
    assert pair.decode.balanced


def test_a_full_prefill_worker_refuses_a_probe(make_pair: MakePair) -> None:
    pair = idle_link(make_pair)
    pair.prefill.engine.reserve = lambda request: None  # type: ignore[method-assign]
    pair.settle(30)
    assert probe_ends(pair) == {"refused": 1}
    assert pair.prefill.balanced
    assert pair.decode.balanced


@pytest.mark.parametrize("late", [False, True])
def test_a_grammar_goes_on_across_the_hand_over(make_pair: MakePair, late: bool) -> None:
    # Met elsewhere: The first token was accepted twice; JSON of one token crashed.
    grammars = HeldCompiler() if late else ready_compiler(structure(9))
    pair = make_pair(grammars=grammars)
    params = pair.submit(PROMPT, seed=3, max_tokens=12, structured=structure(9))
    if late:
        pair.settle()
        assert not pair.prefill.tokens()
        grammars.release()
    pair.run()
    pair.settle()
    assert pair.decode.tokens() == undisturbed(PROMPT, params)
    (end,) = pair.decode.finished()
    assert end.reason == worker_pb2.FINISH_REASON_STOP
    assert pair.prefill.balanced and pair.decode.balanced


def test_a_definition_that_cannot_be_ends_both_sides_with_the_same_cause(
    make_pair: MakePair,
) -> None:
    pair = make_pair(grammars=ready_compiler(BAD))
    pair.submit(PROMPT, structured=BAD)
    pair.settle(60)
    for side in (pair.prefill, pair.decode):
        (end,) = side.finished()
        assert (end.reason, end.error_code) == (
            worker_pb2.FINISH_REASON_FAILED,
            "invalid_request",
        )
        assert not side.tokens() and side.balanced


def test_prefill_is_drained_once_its_leases_are_read_and_not_before(make_pair: MakePair) -> None:
    """Whenever it is told to drain, decode gets all of what it was promised."""
    # Met elsewhere: Prefill left while decode was still to read from it.
    for turns in range(1, TURNS_OF_A_HANDOVER, 2):
        pair = make_pair(max_chunk_tokens=4)
        params = pair.submit(PROMPT)
        for _ in range(turns):
            pair.turn()
        drain = worker_pb2.DrainRequest(timeout_ms=60_000)
        call = ipc_pb2.AdminCall(id=1, drain=drain)
        pair.prefill.pipe.inbox.append(ipc_pb2.EngineCommand(call=call))
        for _ in range(10 * TURNS_OF_A_HANDOVER):
            pair.turn()
            replies = [e.reply for e in pair.prefill.pipe.sent if e.HasField("reply")]
            if replies:
                break
        assert replies[0].drain.drained
        assert not pair.prefill.role.leases and pair.prefill.balanced
        pair.run()
        pair.settle()
        assert pair.decode.tokens() == undisturbed(PROMPT, params)
        assert pair.decode.balanced


def test_prefill_that_ends_at_any_turn_never_gives_a_wrong_token(make_pair: MakePair) -> None:
    """Its last words reach decode and the router; what was handed over goes on."""
    for turns in range(1, TURNS_OF_A_HANDOVER, 2):
        pair = make_pair(max_chunk_tokens=4)
        params = pair.submit(PROMPT)
        for _ in range(turns):
            pair.turn()
        pair.prefill.pipe.inbox.append(ipc_pb2.EngineCommand(stop=ipc_pb2.Stop()))
        pair.prefill.loop.run()
        pair.relay()
        pair.cut()
        for _ in range(10 * TURNS_OF_A_HANDOVER):
            pair.decode.loop.turn()
            pair.clock.now += 0.01
            if pair.decode.finished() and pair.decode.balanced:
                break
        (end,) = pair.decode.finished()
        expected = undisturbed(PROMPT, params)
        if end.reason == worker_pb2.FINISH_REASON_FAILED:
            assert end.error_code in RETRYABLE
            assert pair.decode.tokens() == expected[: len(pair.decode.tokens())]
        else:
            assert pair.decode.tokens() == expected
        assert pair.decode.balanced
