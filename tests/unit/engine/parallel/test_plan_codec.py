"""Plans survive the way to other ranks, whatever happens to sequences between two steps."""

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.parallel.plan_codec import PlanDecoder, PlanEncoder
from engine.plan import PENDING, Chunk, SampleSpec, ScoreSpec, StepPlan
from tests.support.sampling import AllowedIds

ids = st.integers(0, 2**31 - 1)
VOCAB = 70
unit = st.floats(0, 1, exclude_min=True)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**64 - 1),
    min_tokens=st.integers(0, 2**64 - 1),
    temperature=st.floats(0, 100),
    top_p=unit,
    top_k=st.integers(0, 2**64 - 1),
    min_p=unit,
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.sampled_from([0.0, 0.25]),
    frequency_penalty=st.sampled_from([0.0, -1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)

scores = st.builds(
    ScoreSpec, st.integers(1, 2**31), st.lists(ids, min_size=1, max_size=5), st.integers(0, 20)
)


@dataclass
class Request:
    name: str
    params: SamplingParams
    prompt: list[int]
    table: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)


def seen(plan: StepPlan) -> list[object]:
    """All that an executor may read; prompt and output only where penalties are on."""
    return [
        (
            chunk.request_id,
            list(chunk.token_ids),
            chunk.start,
            list(chunk.block_table),
            chunk.sample
            and (
                chunk.sample.params,
                chunk.sample.position,
                list(chunk.sample.banned_ids),
                chunk.sample.mask and chunk.sample.mask.words().tolist(),
                chunk.sample.params.penalised
                and (list(chunk.sample.prompt_ids), list(chunk.sample.output_ids)),
            ),
            chunk.score,
        )
        for chunk in plan.chunks
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_step_of_a_changing_batch_survives(data: st.DataObject) -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    requests: list[Request] = []
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        for _ in range(data.draw(st.integers(0, 3), "arrivals")):
            # Names and settings come again, as they do when a request is submitted twice.
            name = data.draw(st.text(max_size=4))
            requests = [request for request in requests if request.name != name]
            settings_ = data.draw(
                params | st.sampled_from([r.params for r in requests] or [GREEDY])
            )
            requests.append(Request(name, settings_, data.draw(st.lists(ids, max_size=4))))
        chunks = []
        for request in data.draw(st.permutations(requests)):
            match data.draw(st.sampled_from(["skip", "chunk", "decode", "pending", "preempt"])):
                case "skip":
                    continue
                case "preempt":
                    request.table = []
                    token_ids = data.draw(st.lists(ids, min_size=1, max_size=5))
                case "chunk":
                    token_ids = data.draw(st.lists(ids, min_size=1, max_size=5))
                case "decode":
                    token_ids = [data.draw(ids)]
                case _:
                    token_ids = [PENDING]
            request.table += data.draw(st.lists(ids, max_size=3))
            spec = None
            if data.draw(st.booleans()):
                banned = data.draw(st.lists(ids, max_size=2))
                position = data.draw(st.integers(0, 2**40))
                spec = SampleSpec(request.params, position, request.prompt, request.output, banned)
                if data.draw(st.booleans()):
                    spec.mask = AllowedIds(VOCAB, *data.draw(st.sets(st.integers(0, VOCAB - 1))))
            start = data.draw(st.integers(0, 2**31))
            score = data.draw(st.none() | scores)
            chunks.append(Chunk(request.name, token_ids, start, request.table, spec, score))
        plan = StepPlan(chunks)
        assert seen(decoder.decode(encoder.encode(plan))) == seen(plan)
        for request in requests:
            request.output += data.draw(st.lists(ids, max_size=2))


GREEDY = SamplingParams(temperature=0)


def decode_plan(count: int, tables: list[list[int]], step: int = 0) -> StepPlan:
    return StepPlan(
        [
            Chunk(f"r{i}", [7], 100 + step, tables[i], SampleSpec(GREEDY, step, (), ()))
            for i in range(count)
        ]
    )


def test_a_decode_step_costs_its_rows_and_no_tables() -> None:
    encoder = PlanEncoder()
    tables = [list(range(500)) for _ in range(4)]
    first = encoder.encode(decode_plan(4, tables))
    tables[2].append(9)
    second = encoder.encode(decode_plan(4, tables, 1))
    assert len(first) > 4 * 500 * 4
    assert len(second) < 400


def test_a_table_grows_in_place_and_starts_anew_where_the_sequence_lost_its_blocks() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    tables = [[1, 2]]
    first = decoder.decode(encoder.encode(decode_plan(1, tables))).chunks[0].block_table
    tables[0].append(3)
    second = decoder.decode(encoder.encode(decode_plan(1, tables))).chunks[0].block_table
    assert second is first and list(second) == [1, 2, 3]
    tables[0] = [8]
    third = decoder.decode(encoder.encode(decode_plan(1, tables))).chunks[0].block_table
    assert third is not first and list(third) == [8] and list(first) == [1, 2, 3]


def test_requests_that_are_gone_are_forgotten_on_both_sides() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    for index in range(1000):
        chunk = Chunk(f"r{index}", [1], 0, [index], SampleSpec(GREEDY, 0, (), ()))
        got = decoder.decode(encoder.encode(StepPlan([chunk])))
        assert list(got.chunks[0].block_table) == [index]
    assert len(encoder._known) == len(decoder._slots) - 1 == 64


@given(st.binary(max_size=200))
def test_bytes_that_are_no_plan_are_refused(noise: bytes) -> None:
    good = PlanEncoder().encode(decode_plan(2, [[1], [2, 3]]))
    broken = noise + good[len(noise) :] if len(noise) < len(good) else noise
    try:
        PlanDecoder().decode(broken)
    except ValueError:
        return
    assert len(broken) == len(good)


def test_sampling_settings_that_can_not_be_are_refused() -> None:
    good = PlanEncoder().encode(decode_plan(2, [[1], [2, 3]]))
    one = struct.pack("<d", 1.0)
    assert one in good, "top_p is 1"
    with pytest.raises(ValueError, match="top_p"):
        PlanDecoder().decode(good.replace(one, bytes(8)))


@pytest.mark.parametrize("cut", [1, 4, 40])
def test_a_message_cut_short_or_too_long_is_refused(cut: int) -> None:
    good = PlanEncoder().encode(decode_plan(2, [[1], [2, 3]]))
    for broken in (good[:-cut], good + bytes(cut), struct.pack("<I", 1 << 31) + good[4:]):
        with pytest.raises(ValueError, match=r"."):
            PlanDecoder().decode(broken)
