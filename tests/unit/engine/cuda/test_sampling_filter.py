"""What top_k, top_p and min_p keep, found on the device."""

import math

import pytest
import torch

from engine.plan import SampleSpec
from tests.support.sampling import assert_drawn, make_spec

pytest.importorskip("triton")
from engine.cuda.kernels.sampling import chunk_stats
from engine.cuda.kernels.sampling_filter import floors_of
from engine.cuda.sampling import Sampler, draw_plain, plain_arrays

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK = 64
FEW, MANY = 16, 1024
"""Candidates: so few that rows of 200 logits overflow them, so many that all fit."""


def kept(logits: torch.Tensor, candidates: int = FEW, **filters: float) -> list[int]:
    """Ids that are not below the floor of one row."""
    row = logits.to(DEVICE)[None]
    temperatures = torch.tensor([filters.get("temperature", 1.0)], device=DEVICE)
    stats = chunk_stats(row, None, temperatures, groups=8, chunk=CHUNK)
    least = filters.get("min_p", 0.0)
    drop = temperatures.item() * math.log(least) if least else float("-inf")
    settings = (
        torch.tensor([filters.get("top_k", 0)], dtype=torch.int32, device=DEVICE),
        torch.tensor([filters.get("top_p", 1.0)], dtype=torch.float64, device=DEVICE),
        torch.tensor([drop], device=DEVICE),
    )
    assert stats[2] is not None
    floors = floors_of(
        row,
        None,
        temperatures,
        settings,
        (*stats[:2], stats[2]),
        chunk=CHUNK,
        candidates=candidates,
    )
    return (row[0].float() >= floors[0]).nonzero()[:, 0].tolist()


def probabilities(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def spread(size: int = 200, seed: int = 0) -> torch.Tensor:
    """Distinct logits in random order."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order / 16 - 4


@pytest.mark.parametrize("candidates", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 7, 9, 100, 199])
def test_top_k_keeps_the_k_largest(top_k: int, dtype: torch.dtype, candidates: int) -> None:
    logits = spread().to(dtype)
    expected = set(logits.float().topk(top_k).indices.tolist())
    assert len(logits.unique()) == 200
    assert set(kept(logits, candidates, top_k=top_k)) == expected


def test_top_k_tells_neighbouring_floats_apart() -> None:
    logits = torch.full((200,), -3.0)
    for token_id in (150, 3, 70, 190):
        logits[token_id] = torch.nextafter(logits.max(), torch.tensor(0.0))
    assert kept(logits, top_k=3) == [3, 70, 190]


@pytest.mark.parametrize("candidates", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_as_likely_as_the_last_one_kept_are_kept(
    dtype: torch.dtype, candidates: int
) -> None:
    logits = torch.full((200,), -2.0, dtype=dtype)
    logits[[5, 70, 150]] = -1.0
    logits[120] = 1.0
    assert kept(logits, candidates, top_k=2) == [5, 70, 120, 150]
    # The first is 9 % of the mass, the first four 13 %; if one of the equal rest comes in, all do.
    assert len(kept(logits, candidates, top_p=0.5)) == 200
    assert kept(logits, candidates, top_p=0.1) == [5, 70, 120, 150]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probs = probabilities(0.1, 0.4, 0.2, 0.3)
    for candidates in (2, MANY):
        assert kept(probs, candidates, top_p=0.65) == [1, 3]
        assert kept(probs, candidates, top_p=0.75) == [1, 2, 3]
        assert kept(probs, candidates, top_p=1e-6) == [1]
        assert kept(probs, candidates, top_p=1 - 1e-9) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 9.0])
def test_top_p_looks_past_the_candidates_when_the_distribution_is_flat(
    top_p: float, temperature: float
) -> None:
    logits = spread()
    ordered = torch.softmax(logits.double() / temperature, 0).sort(descending=True)
    count = int((ordered.values.cumsum(0) < top_p).sum()) + 1
    expected = sorted(ordered.indices[:count].tolist())
    for candidates in (FEW, MANY):
        assert kept(logits, candidates, top_p=top_p, temperature=temperature) == expected


def test_top_p_works_on_what_top_k_left() -> None:
    # Of the kept 0.4, 0.3, 0.2 the first two are 78 %, though only 70 % of all.
    probs = probabilities(0.1, 0.4, 0.2, 0.3)
    assert kept(probs, top_k=3, top_p=0.75) == [1, 3]
    # Two of three tied tokens make up the k, so the mass is 0.8 and half of it is 0.4.
    tied = probabilities(0.2, 0.4, 0.2, 0.2)
    assert kept(tied, top_k=3, top_p=0.49) == [1]
    assert kept(tied, top_k=3, top_p=0.51) == [0, 1, 2, 3]


def test_min_p_is_relative_to_the_most_likely() -> None:
    probs = probabilities(0.1, 0.4, 0.2, 0.3)
    assert kept(probs, min_p=0.6) == [1, 3]
    assert kept(probs, min_p=0.6, temperature=2.0) == [1, 2, 3]
    assert kept(probs, min_p=1.0) == [1]
    assert kept(probs, min_p=0.6, top_k=1) == [1]
    assert kept(probs, min_p=0.3, top_k=3) == [1, 2, 3]
    assert kept(probs, min_p=0.6, top_k=3) == [1, 3]
    assert kept(probs, min_p=0.6, top_p=0.95) == [1, 3]
    assert kept(probs, min_p=0.3, top_p=0.3) == [1]


def test_drawn_tokens_are_the_references_at_many_positions() -> None:
    logits = spread(100, seed=4).expand(18, 100)
    settings: list[dict[str, float]] = [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.4},
        {"top_k": 20, "top_p": 0.9, "temperature": 0.6},
        {"top_k": 60, "top_p": 0.8, "min_p": 0.02, "temperature": 3.0},
        {"top_k": 5000, "top_p": 0.05, "temperature": 5.0},
    ]
    specs = [make_spec(i, seed=i, **settings[i % len(settings)]) for i in range(len(logits))]
    drawn = draw(logits, specs)
    for row, spec, token_id in zip(logits, specs, drawn, strict=True):
        assert_drawn(row, spec, token_id)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.stack([spread(100, seed=i) for i in range(4)])
    specs = [
        make_spec(3, seed=1, top_p=0.9),
        make_spec(8, seed=2),
        make_spec(9, seed=3, top_k=4, presence_penalty=1.0, output=(1, 2)),
        make_spec(2, seed=4, temperature=0),
    ]
    together = draw(logits, specs)
    assert draw(logits.flip(0), specs[::-1]) == together[::-1]
    alone = [draw(logits[i : i + 1], specs[i : i + 1])[0] for i in range(4)]
    assert alone == together


def draw(logits: torch.Tensor, specs: list[SampleSpec]) -> list[int]:
    out = torch.empty(len(specs), dtype=torch.int32, device=DEVICE)
    arrays = [torch.from_numpy(array).to(DEVICE) for array in plain_arrays(specs)]
    draw_plain(logits.to(DEVICE), *arrays, out, chunk=CHUNK)
    Sampler(chunk=CHUNK, groups=8, candidates=FEW).draw(logits.to(DEVICE), specs, out)
    return out.tolist()
