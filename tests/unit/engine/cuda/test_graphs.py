"""Which sizes are captured, on which of them a step runs, and what its rows of padding hold."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.graphs import DecodeSteps, batch_ladder, pad_rows
from engine.cuda.inputs import StepInputs

CPU = torch.device("cpu")


def inputs(max_rows: int, max_blocks: int) -> StepInputs:
    return StepInputs(max_tokens=max_rows, max_rows=max_rows, max_blocks=max_blocks, device=CPU)


def steps(max_rows: int) -> DecodeSteps:
    attention = SimpleNamespace(decodes=lambda size, block_ids: SimpleNamespace(parts=()))
    return DecodeSteps(
        compute=cast(Any, None),
        inputs=inputs(max_rows, max_rows),
        attention=cast(Any, attention),
        cos_sin=torch.zeros(1),
        max_rows=max_rows,
        capture=False,
    )


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (33, [1, 2, 4, 8, 16, 24, 32, 33]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
    ],
)
def test_ladder(max_rows: int, sizes: list[int]) -> None:
    assert batch_ladder(max_rows) == sizes


@given(max_rows=st.integers(1, 600))
def test_ladder_rises_to_the_largest_step(max_rows: int) -> None:
    sizes = batch_ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows


@pytest.mark.parametrize("max_rows", [1, 5, 24, 100])
def test_step_runs_on_the_least_size_that_holds_it(max_rows: int) -> None:
    decodes = steps(max_rows)
    assert decodes.sizes == batch_ladder(max_rows)
    for rows in range(1, max_rows + 1):
        assert decodes.padded(rows) == min(size for size in decodes.sizes if size >= rows)


@given(
    lengths=st.lists(st.integers(1, 5), max_size=6),
    padding=st.integers(0, 6),
    data=st.data(),
)
def test_padding_writes_nothing_and_attends_to_one_token_of_block_0(
    lengths: list[int], padding: int, data: st.DataObject
) -> None:
    rows, size = len(lengths), len(lengths) + padding
    entries = sum(lengths)
    made = inputs(max(1, size), entries + padding)
    junk = st.integers(-(1 << 31), (1 << 31) - 1)
    for area in (made.token_ids, made.slots, made.positions, made.source_rows, made.block_ids):
        area[:] = data.draw(junk)
    for area in (made.draw_positions, made.last_lens):
        area[:] = data.draw(junk)
    made.seeds[:], made.temperatures[:] = 7, 0.5
    made.table_starts[: rows + 1] = [sum(lengths[:row]) for row in range(rows + 1)]
    before = {name: getattr(made, name)[:rows].copy() for name in ("token_ids", "slots", "seeds")}
    tables = made.block_ids[:entries].copy()

    assert pad_rows(made, rows, size, entries) == entries + padding

    assert (made.slots[rows:size] == -1).all()
    assert (made.source_rows[rows:size] == -1).all()
    assert (made.last_lens[rows:size] == 1).all()
    assert (made.temperatures[rows:size] == 0).all()
    for area in (made.token_ids, made.positions, made.seeds, made.draw_positions):
        assert not area[rows:size].any()
    starts = made.table_starts[: size + 1].tolist()
    assert [b - a for a, b in pairwise(starts)] == [*lengths, *[1] * padding]
    assert not made.block_ids[entries : entries + padding].any()
    for name, values in before.items():
        assert (getattr(made, name)[:rows] == values).all()
    assert (made.block_ids[:entries] == tables).all()
