"""The parts that ranks take are the whole, each element once."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from engine.loader.source import WeightSource
from engine.parallel.group import Alone

CPU = torch.device("cpu")


@dataclass
class Rank(Alone):
    rank: int
    size: int


def source(rank: int, size: int) -> WeightSource:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)

    return WeightSource({"w"}, read, Rank(rank, size), dtype=torch.float32, device=CPU)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.sampled_from([0, 1]))
def test_parts_are_equally_long_and_make_up_the_whole(
    rows: int, columns: int, size: int, dim: int
) -> None:
    whole = source(0, 1).split(dim).get("w", rows, columns)
    parts = [source(rank, size).split(dim).get("w", rows, columns) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    assert all(part.is_contiguous() for part in parts)
    joined = torch.cat(parts, dim)
    length = whole.shape[dim]
    assert torch.equal(joined.narrow(dim, 0, length), whole)
    assert not joined.narrow(dim, length, joined.shape[dim] - length).any()


@given(st.integers(1, 9), st.integers(1, 6))
def test_a_bias_is_divided_with_its_rows_and_counted_once_with_columns(
    length: int, size: int
) -> None:
    whole = source(0, 1).get("w", length)
    ranks = [source(rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([r.split(0).get("w", length) for r in ranks])[:length], whole)
    assert torch.equal(torch.stack([r.split(1).get("w", length) for r in ranks]).sum(0), whole)


def test_what_a_view_takes_counts_as_taken_and_the_rest_stays_whole() -> None:
    weights = source(1, 2)
    with pytest.raises(ConfigError, match="1 weights"):
        weights.finish()
    weights.split(0).get("w", 4, 2)
    weights.finish()
    assert weights.get("w", 4, 2).shape == (4, 2)
