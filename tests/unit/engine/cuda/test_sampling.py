"""The device's sampler against the CPU's, on the GPU where there is one, else interpreted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import SampleSpec
from engine.sampler.philox import uniform
from engine.sampler.sampler import sample
from tests.support.sampling import AllowedIds, assert_drawn, make_spec

pytest.importorskip("triton")
import triton
import triton.language as tl

from engine.cuda.kernels.sampling import _invert, _uniform, chunk_stats, pick
from engine.cuda.sampling import Sampler, draw_plain, needs_more, plain_arrays

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK = 64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def on_device(specs: list[SampleSpec]) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(DEVICE) for array in plain_arrays(specs)]


def plain(logits: torch.Tensor, specs: list[SampleSpec], chunk: int = CHUNK) -> list[int]:
    out = torch.full((len(specs),), -7, dtype=torch.int32, device=DEVICE)
    draw_plain(logits.to(DEVICE), *on_device(specs), out, chunk=chunk)
    return out.tolist()


def full(logits: torch.Tensor, specs: list[SampleSpec]) -> list[int]:
    """Everything, with sizes so small that every path is taken."""
    out = torch.tensor(plain(logits, specs), dtype=torch.int32, device=DEVICE)
    Sampler(chunk=CHUNK, groups=8, candidates=16).draw(logits.to(DEVICE), specs, out)
    return out.tolist()


@triton.jit
def _uniforms(seeds, positions, out):
    row = tl.program_id(0)
    tl.store(out + row, _uniform(tl.load(seeds + row), tl.load(positions + row)))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_uniform_is_bit_equal_to_the_cpu_samplers(dtype: type[np.signedinteger]) -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x299F31D0A4093822]
    positions = np.array([0, 1, 5, 2**16, 2**31 - 1, 2**30, 77], dtype)
    if dtype is np.int64:
        positions[-1] = 2**40 + 3
    out = torch.empty(len(seeds), dtype=torch.float64, device=DEVICE)
    bits = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)).to(DEVICE)
    _uniforms[(len(seeds),)](bits, torch.from_numpy(positions).to(DEVICE), out)
    assert out.tolist() == [uniform(s, int(p)) for s, p in zip(seeds, positions, strict=True)]


@triton.jit
def _inversion(weights, target, out):
    index = tl.arange(0, 4)
    tl.store(out, _invert(tl.load(weights + index), index, tl.load(target)))


@pytest.mark.parametrize(
    ("target", "expected"), [(-1e-18, 1), (0.0, 1), (0.99, 1), (1.0, 3), (2.99, 3), (3.01, 3)]
)
def test_inversion_finds_the_first_weight_that_passes_the_target(
    target: float, expected: int
) -> None:
    weights = torch.tensor([0, 1, 0, 2], dtype=torch.float64, device=DEVICE)
    out = torch.empty(1, dtype=torch.int32, device=DEVICE)
    _inversion[(1,)](weights, torch.tensor([target], dtype=torch.float64, device=DEVICE), out)
    assert out.item() == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 300])
def test_plain_rows_are_the_references(vocab_size: int, dtype: torch.dtype) -> None:
    temperatures = (0.0, 1.0, 0.01, 50.0, 0.7, 1e-20)
    logits = normal(len(temperatures), vocab_size).to(dtype)
    specs = [make_spec(i, seed=2**63 + i, temperature=t) for i, t in enumerate(temperatures)]
    for row, spec, token_id in zip(logits, specs, plain(logits, specs), strict=True):
        assert_drawn(row, spec, token_id)


def test_plain_rows_equal_the_reference_at_many_positions_with_any_chunk() -> None:
    logits = normal(1, 200).expand(20, 200)
    specs = [make_spec(i, seed=5, temperature=4.0) for i in range(20)]
    expected = [result.token_id for result in sample(logits.clone(), specs)]
    assert len(set(expected)) > 9
    assert plain(logits, specs) == expected
    assert plain(logits, specs, chunk=32) == expected
    assert plain(logits, specs, chunk=256) == expected


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.full((4, 300), -1.0)
    logits[0, [70, 71, 290]] = 2.0
    logits[1, [63, 64]] = 2.0
    logits[2, 299] = -0.5
    assert plain(logits, [make_spec(temperature=0)] * 4) == [70, 63, 299, 0]


def test_only_tokens_of_some_probability_are_drawn_at_the_borders_of_chunks() -> None:
    ids = [0, 63, 64, 127, 128, 199]
    logits = torch.full((1, 200), float("-inf"))
    logits[0, ids] = 0.0
    specs = [make_spec(i, seed=3) for i in range(40)]
    drawn = plain(logits.expand(40, 200), specs)
    assert set(drawn) == set(ids)
    expected = [ids[int(uniform(3, i) * len(ids))] for i in range(40)]
    assert drawn == expected


def test_frequencies_follow_the_softmax() -> None:
    probs = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1])
    count = 200
    specs = [make_spec(i, seed=9) for i in range(count)]
    drawn = plain(probs.log().expand(count, 5), specs, chunk=4)
    for token_id, expected in enumerate(probs.tolist()):
        share = drawn.count(token_id) / count
        assert share == pytest.approx(expected, abs=0.1)


def test_a_target_past_the_end_takes_the_last_token_of_some_probability() -> None:
    logits = torch.full((1, 150), float("-inf"), device=DEVICE)
    logits[0, [3, 140]] = 0.0
    specs = [make_spec(position=next(i for i in range(99) if uniform(0, i) > 0.9))]
    temperatures, seeds, positions = on_device(specs)
    maxima, sums, _ = chunk_stats(logits, None, temperatures, chunk=CHUNK)
    out = torch.empty(1, dtype=torch.int32, device=DEVICE)
    # As if rounding had made the sum of the last chunk too large.
    sums[0, 2] *= 2
    pick(logits, None, temperatures, seeds, positions, None, (maxima, sums), out, chunk=CHUNK)
    assert out.tolist() == [140]


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 100.0])
def test_rows_of_anything_give_an_id_of_the_vocabulary(temperature: float) -> None:
    nan, infinity = float("nan"), float("inf")
    logits = normal(6, 70)
    logits[0] = nan
    logits[1] = -infinity
    logits[2] = infinity
    logits[3, 20] = nan
    logits[4, 66] = infinity
    logits[5, :69] = -infinity
    specs = [make_spec(i, temperature=temperature, top_k=5, top_p=0.9) for i in range(6)]
    for drawn in (plain(logits, specs), full(logits, specs)):
        assert all(0 <= token_id < 70 for token_id in drawn)
        assert drawn[3] != 20
        assert drawn[4:] == [66, 69]


def test_rows_may_be_any_number_of_logits_apart() -> None:
    logits = normal(3, 130)
    specs = [make_spec(i, temperature=i / 2) for i in range(3)]
    expected = plain(logits[:, :100].contiguous(), specs)
    assert plain(logits[:, :100], specs) == expected


def test_plain_specs_need_no_more() -> None:
    assert not needs_more(make_spec(temperature=0.5, seed=3))
    assert not needs_more(make_spec(temperature=0, top_k=4, top_p=0.5, min_p=0.1))
    for spec in (
        make_spec(top_k=4),
        make_spec(top_p=0.5),
        make_spec(min_p=0.1),
        make_spec(temperature=0, logprobs=0),
        make_spec(temperature=0, banned=(1,)),
        make_spec(temperature=0, mask=AllowedIds(40, 1)),
        make_spec(temperature=0, logit_bias={1: 1.0}),
        make_spec(temperature=0, presence_penalty=1.0),
    ):
        assert needs_more(spec)


VOCAB = 150
ids = st.integers(-2, VOCAB + 2)
masks = st.sets(st.integers(0, VOCAB - 1), min_size=1).map(lambda some: AllowedIds(VOCAB, *some))


@st.composite
def specs_of_any_kind(draw: st.DrawFn) -> SampleSpec:
    def sometimes(value: st.SearchStrategy[object], otherwise: object) -> object:
        return draw(st.one_of(st.just(otherwise), value))

    return make_spec(
        position=draw(st.integers(0, 5000)),
        prompt=draw(st.lists(ids, max_size=5)),
        output=draw(st.lists(ids, max_size=8)),
        banned=tuple(draw(st.lists(ids, max_size=3))),
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=sometimes(st.integers(1, VOCAB + 9), 0),
        top_p=sometimes(st.floats(0.01, 1.0), 1.0),
        min_p=sometimes(st.floats(0.0, 1.0), 0.0),
        presence_penalty=sometimes(st.floats(-2, 2), 0.0),
        frequency_penalty=sometimes(st.floats(-2, 2), 0.0),
        repetition_penalty=sometimes(st.floats(0.1, 3), 1.0),
        logit_bias=sometimes(st.dictionaries(ids, st.floats(-9, 9), max_size=3), {}),
        mask=sometimes(masks, None),
    )


@settings(max_examples=20, deadline=None)
@given(
    specs=st.lists(specs_of_any_kind(), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOATS),
    rounded=st.booleans(),
)
def test_rows_of_every_kind_are_the_references(
    specs: list[SampleSpec], seed: int, dtype: torch.dtype, rounded: bool
) -> None:
    logits = normal(len(specs), VOCAB, seed=seed).to(dtype)
    if rounded:
        logits = logits.round()
    before = logits.clone()
    drawn = full(logits, specs)
    assert torch.equal(logits, before)
    for row, spec, token_id in zip(logits, specs, drawn, strict=True):
        assert_drawn(row, spec, token_id)
