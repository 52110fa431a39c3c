"""The layout of a step's numbers: every area its own memory, mirrored by one copy."""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.inputs import StepInputs

MIRRORED = (
    *("token_ids", "source_rows", "positions", "slots", "output_rows", "draw_positions"),
    *("seeds", "temperatures", "block_ids"),
)
HOST_ONLY = ("table_starts", "last_lens")


def make(max_tokens: int = 6, max_rows: int = 3, max_blocks: int = 9) -> StepInputs:
    return StepInputs(
        max_tokens=max_tokens,
        max_rows=max_rows,
        max_blocks=max_blocks,
        device=torch.device("cpu"),
    )


def fill(inputs: StepInputs) -> dict[str, Any]:
    """Different values in every element of every area; returns what was written."""
    written, value = {}, 1
    for name in (*MIRRORED, *HOST_ONLY):
        area = getattr(inputs, name)
        area[:] = np.arange(value, value + len(area)).astype(area.dtype)
        written[name] = area.copy()
        value += len(area)
    return written


@given(max_tokens=st.integers(1, 40), max_rows=st.integers(1, 20), max_blocks=st.integers(1, 60))
def test_areas_are_large_enough_and_apart(max_tokens: int, max_rows: int, max_blocks: int) -> None:
    inputs = make(max_tokens, max_rows, max_blocks)
    written = fill(inputs)
    for name, values in written.items():
        assert (getattr(inputs, name) == values).all(), f"{name} was overwritten"
    for name in ("token_ids", "source_rows", "positions", "slots"):
        assert len(written[name]) == max_tokens
    # One start more than rows; a step that samples nothing has one output row all the same.
    assert len(written["table_starts"]) == len(written["output_rows"]) == max_rows + 1
    assert len(written["seeds"]) == len(written["temperatures"]) == max_rows
    assert len(written["block_ids"]) == max_blocks


@given(sent=st.integers(0, 9))
def test_one_copy_brings_everything_and_of_the_tables_what_is_used(sent: int) -> None:
    inputs = make()
    written = fill(inputs)
    assert not inputs.device_token_ids.any()
    inputs.reuse()
    inputs.send(sent)
    inputs.sent()
    for name in MIRRORED:
        mirror = getattr(inputs, f"device_{name}").numpy()
        expected = written[name]
        if name == "block_ids":
            expected = np.where(np.arange(9) < sent, expected, 0)
        assert (mirror == expected).all(), name


def test_wide_seeds_and_fractions_survive() -> None:
    inputs = make()
    inputs.seeds[:] = [-(1 << 63), (1 << 63) - 1, 1 << 40]
    inputs.temperatures[:] = [0.1, 1e-7, 2.0]
    inputs.send(0)
    assert inputs.device_seeds.tolist() == [-(1 << 63), (1 << 63) - 1, 1 << 40]
    assert inputs.device_temperatures.tolist() == inputs.temperatures.tolist()
    assert inputs.device_seeds.dtype == torch.int64
    assert inputs.device_temperatures.dtype == torch.float32


def test_addresses_stay_for_graphs_that_read_them() -> None:
    inputs = make()
    before = inputs.device_slots.data_ptr()
    fill(inputs)
    inputs.send(9)
    assert inputs.device_slots.data_ptr() == before
