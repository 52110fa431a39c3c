"""KV that leaves an engine under holds and enters another through reservations."""

import pytest

from core.finish import FinishReason
from core.tokens import TokenLogprobs
from engine.engine import Engine
from engine.request import Reservation, SequenceOutput
from tests.support.engine import MakeEngine, make_request, run, step_until_preempted
from tests.support.fake_executor import FakeExecutor, kv_of, undisturbed


def prefill(engine: Engine, request_id: str) -> SequenceOutput:
    """Step until the request has ended."""
    for _ in range(100):
        for output in engine.step().outputs:
            if output.request_id == request_id and output.finish_reason is not None:
                return output
    raise AssertionError("it never ended")


def bring_in(executor: FakeExecutor, reservation: Reservation, tokens: list[int]) -> None:
    """Write the KV of `tokens` into the blocks that were not cached."""
    size, kv = executor.pool.block_size, kv_of(tokens)
    for position in range(reservation.num_cached_blocks * size, len(tokens)):
        block_id = reservation.block_table[position // size]
        executor.pool.blocks[block_id][position % size] = kv[position]


def test_prompt_computed_on_one_engine_goes_on_in_another(make_engine: MakeEngine) -> None:
    sampling = {"max_tokens": 9, "seed": 5, "logprobs": 0}
    request = make_request("r", 10, **sampling)
    expected = undisturbed(request.prompt_ids, request.sampling)
    source, source_executor = make_engine(max_chunk_tokens=4)
    source.add(make_request("r", 10, prefill_only=True, **sampling))
    end = prefill(source, "r")
    assert end.finish_reason is FinishReason.HANDED_OVER
    assert (end.token_ids, end.num_computed) == ((expected[0],), 10)
    blocks = list(source.block_table("r"))
    source.hold(blocks)
    source.step()

    target, executor = make_engine(num_blocks=8)
    reservation = target.reserve(request)
    assert reservation is not None
    assert (reservation.num_tokens, len(reservation.block_table)) == (10, 3)
    for theirs, ours in zip(blocks, reservation.block_table, strict=True):
        executor.pool.blocks[ours][:] = source_executor.pool.blocks[theirs]
    source.release(blocks)
    source.check_integrity()
    assert source.stats().held_blocks == 0
    adopted = target.adopt(reservation, end.token_ids[0], end.logprobs[0])
    assert (adopted.token_ids, adopted.first_index, adopted.finish_reason) == (
        (expected[0],),
        0,
        None,
    )
    assert adopted.logprobs == (TokenLogprobs(-1.0),)
    transcript = run(target)
    assert transcript.tokens["r"] == expected[1:], "the adopted token is not reported again"
    assert executor.plans[0].chunks[0].start == 10


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"stop_token_ids": tuple(range(97))}])
def test_prefill_whose_first_token_ends_the_output_hands_nothing_over(
    make_engine: MakeEngine,
    sampling: dict[str, object],
) -> None:
    engine, _ = make_engine()
    engine.add(make_request("r", 6, prefill_only=True, **sampling))
    assert prefill(engine, "r").finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_held_blocks_survive_request_flush_and_pressure(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=6)
    engine.add(make_request("r", 6, prefill_only=True))
    prefill(engine, "r")
    blocks = list(engine.block_table("r"))
    engine.hold(blocks)
    content = executor.pool.read(blocks, 6)
    engine.flush_cache()
    for index in range(3):
        engine.add(make_request(f"other{index}", [index + 9] * 12, max_tokens=2))
        run(engine)
    assert executor.pool.read(blocks, 6) == content == kv_of(make_request("", 6).prompt_ids)
    assert engine.stats().held_blocks == 2
    engine.release(blocks)
    assert engine.stats().held_blocks == 0
    engine.check_integrity()


def test_release_without_a_hold_is_noticed(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    engine.add(make_request("r", 8))
    engine.step()
    with pytest.raises(AssertionError, match="without a hold"):
        engine.release(engine.block_table("r"))
    engine.check_integrity()


def test_hold_after_the_blocks_were_given_back_is_noticed(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    engine.add(make_request("r", 8, prefill_only=True))
    prefill(engine, "r")
    blocks = list(engine.block_table("r"))
    engine.reap()
    with pytest.raises(AssertionError, match="not held"):
        engine.hold(blocks)


def test_preempted_export_finds_its_held_blocks_again(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=9, max_chunk_tokens=1)
    engine.add(make_request("old", [9] * 12, max_tokens=15))
    for _ in range(13):
        engine.step()
    engine.add(make_request("export", 16, prefill_only=True))
    while engine.stats().running != 2 or engine.num_computed("export") < 8:
        engine.step()
    held = list(engine.block_table("export")[:2])
    engine.hold(held)
    prefill(engine, "export")
    assert engine.stats().preemptions >= 1
    assert list(engine.block_table("export")[:2]) == held
    expected = kv_of(make_request("", 16).prompt_ids)
    assert executor.pool.read(engine.block_table("export"), 16) == expected
    engine.release(held)
    run(engine)
    assert engine.stats().held_blocks == 0


def test_reservation_starts_with_what_is_cached(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    engine.add(make_request("warm", 8, max_tokens=1))
    run(engine)
    whole = engine.reserve(make_request("whole", 8))
    longer = engine.reserve(make_request("longer", [*make_request("", 8).prompt_ids, 3, 4, 5]))
    assert whole is not None and longer is not None
    assert (whole.num_cached_blocks, whole.num_cached_tokens) == (2, 8)
    assert (longer.num_cached_blocks, longer.num_cached_tokens) == (2, 8)
    assert list(longer.block_table[:2]) == list(whole.block_table)
    request = make_request("whole", 8)
    first, *rest = undisturbed(request.prompt_ids, request.sampling)
    engine.adopt(whole, first)
    engine.cancel(longer)
    assert run(engine).tokens["whole"] == rest
    assert executor.plans[-1].chunks[0].start > 8


def test_imported_blocks_are_cached_on_adopt_and_not_before(make_engine: MakeEngine) -> None:
    engine, executor = make_engine()
    reservation = engine.reserve(make_request("r", 9))
    assert reservation is not None
    bring_in(executor, reservation, list(make_request("", 9).prompt_ids))
    assert engine.cached_hashes() == []
    engine.adopt(reservation, 1)
    assert len(engine.cached_hashes()) == 2


def test_cancelled_reservation_frees_its_blocks_and_caches_nothing(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    reservation = engine.reserve(make_request("r", 9))
    assert reservation is not None
    assert engine.stats().held_blocks == 3
    assert not engine.has_work
    for _ in range(2):
        engine.cancel(reservation)
    assert engine.stats().free_blocks == engine.stats().total_blocks
    again = engine.reserve(make_request("r", 9))
    assert again is not None
    engine.cancel(reservation)
    assert engine.stats().held_blocks == 3, "a late cancel of the old one touched the new one"


def test_reservation_can_be_adopted_once_and_not_after_cancel(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    reservation = engine.reserve(make_request("r", 9))
    assert reservation is not None
    engine.cancel(reservation)
    with pytest.raises(AssertionError, match="not open"):
        engine.adopt(reservation, 1)


def test_abort_leaves_a_reservation_to_its_holder(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    reservation = engine.reserve(make_request("r", 9))
    assert reservation is not None
    assert not engine.abort("r")
    assert engine.stats().held_blocks == 3
    engine.adopt(reservation, 1)
    assert engine.abort("r")
    assert engine.stats().held_blocks == 0


@pytest.mark.parametrize(
    ("sampling", "reason", "matched"),
    [
        ({"max_tokens": 1}, FinishReason.LENGTH, None),
        ({"ignore_eos": False}, FinishReason.STOP, None),
        ({"stop_token_ids": (0,)}, FinishReason.STOP, 0),
    ],
)
def test_adopted_token_that_ends_the_output_ends_it_at_once(
    make_engine: MakeEngine, sampling: dict[str, object], reason: FinishReason, matched: int | None
) -> None:
    engine, executor = make_engine()
    reservation = engine.reserve(make_request("r", 9, **sampling))
    assert reservation is not None
    bring_in(executor, reservation, list(make_request("", 9).prompt_ids))
    output = engine.adopt(reservation, 0)
    assert (output.finish_reason, output.matched_stop) == (reason, matched)
    assert engine.has_work
    assert engine.step().outputs == []
    assert engine.stats().held_blocks == 0
    assert len(engine.cached_hashes()) == 2


def test_resubmitted_import_brings_in_prompt_and_earlier_output(make_engine: MakeEngine) -> None:
    # Met elsewhere: A request that was taken back went to a rank that had none of its KV.
    request = make_request("r", 6, max_tokens=9)
    expected = undisturbed(request.prompt_ids, request.sampling)
    engine, executor = make_engine()
    reservation = engine.reserve(make_request("r", 6, max_tokens=9, output_ids=expected[:4]))
    assert reservation is not None and reservation.num_tokens == 10
    bring_in(executor, reservation, [*request.prompt_ids, *expected[:4]])
    assert engine.adopt(reservation, expected[4]).first_index == 4
    assert run(engine).tokens["r"] == expected[5:]


def test_preempted_import_is_computed_here(make_engine: MakeEngine) -> None:
    # Met elsewhere: A request was put back after its KV had come, and never taken up again.
    engine, executor = make_engine(num_blocks=7)
    engine.add(make_request("old", 8, max_tokens=14))
    engine.step()
    request = make_request("import", [9] * 11, max_tokens=9)
    expected = undisturbed(request.prompt_ids, request.sampling)
    reservation = engine.reserve(request)
    assert reservation is not None
    bring_in(executor, reservation, list(request.prompt_ids))
    engine.adopt(reservation, expected[0])
    transcript = run(engine)
    assert engine.stats().preemptions >= 1
    assert transcript.tokens["import"] == expected[1:]


def test_reservation_leaves_the_watermark_to_running_sequences(make_engine: MakeEngine) -> None:
    # Met elsewhere: Limits left out what was promised but not running: one full pool froze
    # the node.
    engine, _ = make_engine(num_blocks=6)
    engine.add(make_request("running", 8))
    engine.step()
    held = engine.stats().held_blocks
    assert engine.reserve(make_request("large", [9] * 9)) is None
    assert engine.stats().held_blocks == held
    reservation = engine.reserve(make_request("small", [9] * 8))
    assert reservation is not None


def test_reservations_take_seats(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_num_seqs=2, num_blocks=64)
    first = engine.reserve(make_request("a"))
    assert first is not None
    assert engine.reserve(make_request("b")) is not None
    assert engine.reserve(make_request("c")) is None
    engine.add(make_request("d"))
    assert engine.step().outputs == []
    assert not engine.has_work
    engine.cancel(first)
    assert engine.has_work
    assert [output.request_id for output in engine.step().outputs] == ["d"]


def test_reservations_and_waiting_requests_take_turns_at_a_seat(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(max_num_seqs=1, num_blocks=64)
    reservation = engine.reserve(make_request("import"))
    assert reservation is not None
    for name in ("a", "b"):
        engine.add(make_request(name, max_tokens=1))
    engine.cancel(reservation)
    assert engine.reserve(make_request("import")) is None, "it is a's turn"
    engine.step()
    assert engine.stats().waiting == 1
    assert engine.reserve(make_request("import")) is not None, "and then the import's again"


def test_reservations_do_not_overtake_a_preempted_request(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=9, max_step_tokens=2)
    engine.add(make_request("a", [1], max_tokens=20))
    engine.add(make_request("b", [2] * 3, max_tokens=20))
    engine.step()
    reservation = engine.reserve(make_request("import", [3] * 12, max_tokens=20))
    assert reservation is not None
    bring_in(executor, reservation, [3] * 12)
    engine.adopt(reservation, 5)
    step_until_preempted(engine)
    assert engine.reserve(make_request("next", [4])) is None
    engine.abort("import")
    engine.abort("b")
    engine.settle()
    assert engine.reserve(make_request("next", [4])) is not None


def test_adopting_wakes_an_idle_engine(make_engine: MakeEngine) -> None:
    engine, executor = make_engine(num_blocks=4)
    reservation = engine.reserve(make_request("import", [3] * 9))
    assert reservation is not None
    engine.add(make_request("waits", 8, max_tokens=1))
    engine.step()
    assert not engine.has_work
    bring_in(executor, reservation, [3] * 9)
    engine.adopt(reservation, 5)
    assert engine.has_work


def test_releasing_a_hold_wakes_an_engine_that_lacked_blocks(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=4)
    engine.add(make_request("export", 12, prefill_only=True))
    prefill(engine, "export")
    blocks = list(engine.block_table("export"))
    engine.hold(blocks)
    engine.add(make_request("waits", [9] * 8, max_tokens=1))
    engine.step()
    assert not engine.has_work
    engine.release(blocks)
    assert len(run(engine).tokens["waits"]) == 1


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_reservations_do_not_overtake_a_request_that_waits_for_blocks(
    make_engine: MakeEngine, penalty: float
) -> None:
    engine, _ = make_engine(num_blocks=8)
    engine.add(make_request("running", 8, max_tokens=20, frequency_penalty=penalty))
    engine.add(make_request("large", [9] * 24))
    engine.step()
    assert engine.stats().waiting == 1
    assert engine.reserve(make_request("small", [3])) is None
    engine.abort("large")
    assert engine.reserve(make_request("small", [3])) is not None
