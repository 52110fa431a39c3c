"""Turns the chunks of a plan into the arrays of a step: tokens, positions, tables, slots, draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.cuda.attention import blocks_of, last_block_lens
from engine.cuda.block_rows import BlockRows
from engine.cuda.inputs import Int32s, StepInputs
from engine.cuda.sampling import plain_arrays
from engine.plan import PENDING, Chunk, SampleSpec


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """How much of the arrays a step uses."""

    lengths: Int32s
    """[B] tokens of each chunk."""
    context_lens: Int32s
    """[B] positions that the last of them attends to."""
    num_tokens: int
    num_blocks: int
    """Entries of `block_ids`."""

    @property
    def last_rows(self) -> Int32s:
        """[B] row of each chunk's last token."""
        rows: Int32s = np.cumsum(self.lengths, dtype=np.int32) - 1
        return rows


class StepWriter:
    """Writes steps; keeps block tables as arrays between them."""

    def __init__(self, block_size: int, max_rows: int) -> None:
        self._block_size = block_size
        self._tables = BlockRows(max_rows)

    def write(
        self, inputs: StepInputs, chunks: Sequence[Chunk], sampled_rows: Mapping[str, int]
    ) -> WrittenStep:
        """Write all but the draws.

        Args:
            inputs: whose earlier content has been sent.
            chunks: of the step, in the order of their rows.
            sampled_rows: row at which the step before sampled for each request.
        """
        self._tables.forget_all_but(chunks)
        lengths = np.array([len(chunk.token_ids) for chunk in chunks], np.int32)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        num_tokens = int(ends[-1])
        positions = inputs.positions[:num_tokens]
        np.subtract(
            np.arange(num_tokens, dtype=np.int32), np.repeat(ends - lengths, lengths), positions
        )
        positions += np.repeat(starts, lengths)
        if num_tokens == len(chunks):
            inputs.token_ids[:num_tokens] = [chunk.token_ids[0] for chunk in chunks]
        else:
            for chunk, end in zip(chunks, ends.tolist(), strict=True):
                inputs.token_ids[end - len(chunk.token_ids) : end] = chunk.token_ids
        self._resolve(inputs, chunks, ends, sampled_rows)
        num_blocks = self._write_tables(inputs, chunks, starts + lengths, lengths)
        return WrittenStep(lengths, starts + lengths, num_tokens, num_blocks)

    def _resolve(
        self,
        inputs: StepInputs,
        chunks: Sequence[Chunk],
        ends: Int32s,
        sampled_rows: Mapping[str, int],
    ) -> None:
        """Say where the tokens that only the device knows come from."""
        num_tokens = int(ends[-1])
        inputs.source_rows[:num_tokens] = -1
        pending = inputs.token_ids[:num_tokens] == PENDING
        if pending.any():
            # A pending token is the only one of its chunk.
            for index in np.flatnonzero(pending[ends - 1]).tolist():
                row = ends[index] - 1
                inputs.token_ids[row] = 0
                inputs.source_rows[row] = sampled_rows[chunks[index].request_id]

    def _write_tables(
        self, inputs: StepInputs, chunks: Sequence[Chunk], context_lens: Int32s, lengths: Int32s
    ) -> int:
        size, count = self._block_size, len(chunks)
        counts = blocks_of(context_lens, size)
        tables = [
            self._tables.array(chunk, num)
            for chunk, num in zip(chunks, counts.tolist(), strict=True)
        ]
        starts = inputs.table_starts[: count + 1]
        starts[0] = 0
        np.cumsum(counts, out=starts[1:])
        total = int(starts[-1])
        np.concatenate(tables, out=inputs.block_ids[:total])
        inputs.last_lens[:count] = last_block_lens(context_lens, size)
        positions = inputs.positions[: int(lengths.sum())]
        blocks = inputs.block_ids[np.repeat(starts[:-1], lengths) + positions // size]
        inputs.slots[: len(positions)] = blocks * size + positions % size
        return total


def write_draws(inputs: StepInputs, specs: Sequence[SampleSpec]) -> None:
    """Write what `draw_plain` needs of each row."""
    arrays, count = plain_arrays(specs), len(specs)
    inputs.temperatures[:count] = arrays.temperatures
    inputs.seeds[:count] = arrays.seeds
    inputs.draw_positions[:count] = arrays.positions
