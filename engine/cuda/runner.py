"""The Executor of one GPU: queues a step and returns before it is computed.

Tokens that a step draws stay on the device and feed the next; the host reads them one step late
from pinned memory. Nothing in `submit` waits for the device but the copies of the step before out
of pinned memory, which were made when that step began.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from core.sampling import SamplingParams
from core.tokens import TokenLogprobs
from engine.cuda.attention import (
    CudaContext,
    FlashInferAttention,
    blocks_of,
    last_block_lens,
)
from engine.cuda.block_rows import BlockRows
from engine.cuda.events import QueuePoint
from engine.cuda.graphs import DecodeSteps, pad_rows
from engine.cuda.inputs import Int32s, StepInputs
from engine.cuda.kernels.tokens import resolve_tokens
from engine.cuda.sampling import Sampler, draw_plain, needs_more, plain_arrays
from engine.cuda.sampling_logprobs import DeviceLogprobs, HostLogprobs
from engine.executor import PendingStep
from engine.kv.pool import KVPool
from engine.layers.decoder import DecoderModel
from engine.models.config import ModelConfig
from engine.plan import PENDING, Chunk, SampleSpec, StepPlan, StepResult

_UNUSED: Final = SampleSpec(SamplingParams(temperature=0), 0, (), ())
"""Of rows that nobody reads."""


class CudaRunner:
    """Implements engine.executor.Executor."""

    def __init__(
        self,
        *,
        model: DecoderModel,
        model_config: ModelConfig,
        model_digest: bytes,
        attention: FlashInferAttention,
        pool: KVPool,
        cos_sin: torch.Tensor,
        limits: "StepLimits",
        cuda_graphs: bool,
    ) -> None:
        """Put the parts together; `engine.cuda.build` makes them."""
        self._model: DecoderModel | None = model
        self._model_config = model_config
        self._model_digest = model_digest
        self._pool = pool
        self._block_size = pool.layout.block_size
        self._cos_sin = cos_sin
        device = pool.tensor.device
        self._max_rows = max_rows = limits.max_rows
        self._attention = attention
        self._tables = BlockRows(max_rows)
        max_blocks = limits.max_table_entries + max_rows
        self._mixed_inputs = StepInputs(
            max_tokens=max(limits.max_tokens, max_rows),
            max_rows=max_rows,
            max_blocks=max_blocks,
            device=device,
        )
        self._decode_inputs = StepInputs(
            max_tokens=max_rows, max_rows=max_rows, max_blocks=max_blocks, device=device
        )
        self._sampler = Sampler()
        self._last_tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._rows: dict[str, int] = {}
        # A step's tokens are read while the next one's are under way.
        self._landings = [_Landing(max_rows, device), _Landing(max_rows, device)]
        self.decodes = DecodeSteps(
            compute=self._compute_decodes,
            inputs=self._decode_inputs,
            attention=attention,
            cos_sin=cos_sin,
            max_rows=max_rows,
            capture=cuda_graphs,
        )

    @property
    def model_config(self) -> ModelConfig:
        """See Executor."""
        return self._model_config

    @property
    def model_digest(self) -> bytes:
        """See Executor."""
        return self._model_digest

    @property
    def pool(self) -> KVPool:
        """See Executor."""
        return self._pool

    @property
    def overlaps(self) -> bool:
        """See Executor."""
        return True

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingStep:
        """See Executor."""
        assert self._model is not None, "submit after close"
        chunks = plan.chunks
        self._tables.forget_all_but(chunks)
        if all(len(chunk.token_ids) == 1 for chunk in chunks):
            step = self._run_decodes(chunks)
        else:
            step = self._run_mixed(chunks)
        logprobs = None
        if any(map(needs_more, step.specs)):
            logprobs = self._sampler.draw(step.logits, step.specs, self._last_tokens)
        sampled = [(i, row) for row, i in enumerate(step.drawn) if chunks[i].sample is not None]
        self._rows = {chunks[i].request_id: row for i, row in sampled}
        landing = self._landings[0]
        self._landings.reverse()
        landing.fetch(self._last_tokens[: len(step.drawn)], logprobs)
        return _CudaStep(landing, len(chunks), sampled)

    def close(self) -> None:
        """See Executor. The pool's memory stays until nobody refers to it."""
        self._model = None

    def rehearse(self, num_tokens: int, max_len: int) -> None:
        """Run the largest steps on padding, which writes no K and V, and wait for them."""
        with torch.inference_mode():
            self.decodes.rehearse(self._max_rows)
            tables = [0] * blocks_of(np.array([max_len], np.int32), self._block_size)[0]
            lengths = [max_len] * (num_tokens // max_len) + [num_tokens % max_len]
            chunks = [
                Chunk(f"rehearsal-{i}", [0] * n, 0, tables, _UNUSED)
                for i, n in enumerate(lengths[: self._max_rows])
                if n
            ]
            self._run_mixed(chunks, write=False)
        self._landings[0].arrived.record()
        self._landings[0].arrived.wait()

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Compile every kernel and capture the graphs, so that no request has to wait for it."""
        with torch.inference_mode():
            self.decodes.capture_all(progress)
        self.rehearse(2 * self._block_size, self._block_size)

    def _run_decodes(self, chunks: Sequence[Chunk]) -> "_Queued":
        """Row i is chunk i, whether it is to be sampled or not."""
        inputs, count = self._decode_inputs, len(chunks)
        inputs.reuse()
        self._write_tokens(inputs, chunks)
        num_blocks = self._write_tables(inputs, chunks, inputs.positions[:count] + 1)
        specs = [chunk.sample or _UNUSED for chunk in chunks]
        _write_draws(inputs, specs)
        size = self.decodes.padded(count)
        if size > count:
            num_blocks = pad_rows(inputs, count, size, num_blocks)
        inputs.send(num_blocks)
        self.decodes.plan(size, num_blocks)
        inputs.sent()
        return _Queued(range(count), specs, self.decodes.run(size)[:count])

    def _run_mixed(self, chunks: Sequence[Chunk], *, write: bool = True) -> "_Queued":
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].token_ids) > 1)
        chunks = [chunks[i] for i in order]
        inputs = self._mixed_inputs
        inputs.reuse()
        lengths = np.array([len(chunk.token_ids) for chunk in chunks], np.int32)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        num_tokens = int(ends[-1])
        self._write_prompts(inputs, chunks, starts, lengths)
        num_blocks = self._write_tables(inputs, chunks, starts + lengths)
        if not write:
            inputs.slots[:num_tokens] = -1
        drawn = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
        specs = [spec for i in drawn if (spec := chunks[i].sample) is not None]
        _write_draws(inputs, specs)
        # A step that samples nothing still computes one row: an empty matrix helps nobody.
        num_rows = max(1, len(drawn))
        inputs.output_rows[:num_rows] = ends[drawn] - 1 if drawn else 0
        inputs.send(num_blocks)
        parts = self._attention.plan_mixed(
            lengths=lengths,
            context_lens=starts + lengths,
            num_decodes=int(np.count_nonzero(lengths == 1)),
            block_ids=inputs.device_block_ids[:num_blocks],
        )
        inputs.sent()
        context = CudaContext(
            parts=parts,
            cos_sin=self._cos_sin,
            positions=inputs.device_positions[:num_tokens],
            slots=inputs.device_slots[:num_tokens],
            output_rows=inputs.device_output_rows[:num_rows],
        )
        assert self._model is not None
        hidden = self._model.forward(self._token_ids(inputs, num_tokens), context)
        logits = self._drawn(inputs, self._model.logits(hidden), num_rows)
        return _Queued([order[i] for i in drawn], specs, logits)

    def _compute_decodes(self, inputs: StepInputs, context: CudaContext, rows: int) -> torch.Tensor:
        assert self._model is not None
        token_ids = self._token_ids(inputs, rows)
        hidden = self._model.forward(token_ids, context)
        return self._drawn(inputs, self._model.logits(hidden), rows)

    def _token_ids(self, inputs: StepInputs, count: int) -> torch.Tensor:
        return resolve_tokens(
            inputs.device_token_ids[:count],
            inputs.device_source_rows[:count],
            self._last_tokens,
        )

    def _drawn(self, inputs: StepInputs, logits: torch.Tensor, rows: int) -> torch.Tensor:
        draw_plain(
            logits,
            inputs.device_temperatures[:rows],
            inputs.device_seeds[:rows],
            inputs.device_draw_positions[:rows],
            self._last_tokens[:rows],
        )
        return logits

    def _write_tokens(self, inputs: StepInputs, chunks: Sequence[Chunk]) -> None:
        count = len(chunks)
        tokens = np.array([chunk.token_ids[0] for chunk in chunks], np.int32)
        pending = tokens == PENDING
        inputs.token_ids[:count] = np.where(pending, 0, tokens)
        inputs.source_rows[:count] = -1
        if pending.any():
            sources = [self._rows.get(chunk.request_id, -1) for chunk in chunks]
            inputs.source_rows[:count] = np.where(pending, sources, -1)
            assert inputs.source_rows[:count][pending].min() >= 0, "no token is pending"
        inputs.positions[:count] = [chunk.start for chunk in chunks]

    def _write_prompts(
        self, inputs: StepInputs, chunks: Sequence[Chunk], starts: Int32s, lengths: Int32s
    ) -> None:
        total = int(lengths.sum())
        offsets = np.arange(total, dtype=np.int32)
        firsts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        inputs.positions[:total] = offsets - firsts + np.repeat(starts, lengths)
        inputs.source_rows[:total] = -1
        row = 0
        for chunk in chunks:
            length = len(chunk.token_ids)
            if length == 1 and chunk.token_ids[0] == PENDING:
                inputs.token_ids[row] = 0
                inputs.source_rows[row] = self._rows[chunk.request_id]
            else:
                inputs.token_ids[row : row + length] = chunk.token_ids
            row += length

    def _write_tables(
        self, inputs: StepInputs, chunks: Sequence[Chunk], context_lens: Int32s
    ) -> int:
        """Write tables and the slots of all tokens. Returns entries of block_ids in use."""
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
        lengths = np.array([len(chunk.token_ids) for chunk in chunks], np.int32)
        num_tokens = int(lengths.sum())
        positions = inputs.positions[:num_tokens]
        blocks = inputs.block_ids[np.repeat(starts[:-1], lengths) + positions // size]
        inputs.slots[:num_tokens] = blocks * size + positions % size
        return total


def _write_draws(inputs: StepInputs, specs: Sequence[SampleSpec]) -> None:
    arrays, count = plain_arrays(specs), len(specs)
    inputs.temperatures[:count] = arrays.temperatures
    inputs.seeds[:count] = arrays.seeds
    inputs.draw_positions[:count] = arrays.positions


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How large a step can be."""

    max_tokens: int
    max_rows: int
    max_table_entries: int
    """Blocks in all tables of a step together; blocks shared by several sequences count again."""


@dataclass(frozen=True, slots=True)
class _Queued:
    """A step on its way through the device."""

    drawn: Sequence[int]
    """Which chunk each row of logits belongs to."""
    specs: Sequence[SampleSpec]
    """One per row."""
    logits: torch.Tensor


class _Landing:
    """Pinned memory in which a step's tokens arrive."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned)
        self.arrived = QueuePoint(device)
        self.logprobs: HostLogprobs | None = None

    def fetch(self, tokens: torch.Tensor, logprobs: DeviceLogprobs | None) -> None:
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self.logprobs = None if logprobs is None else logprobs.to_host()
        self.arrived.record()


@dataclass(frozen=True, slots=True)
class _CudaStep:
    """Implements PendingStep."""

    landing: _Landing
    num_chunks: int
    sampled: Sequence[tuple[int, int]]
    """(chunk, row) of each token."""

    def wait(self) -> StepResult:
        """See PendingStep."""
        self.landing.arrived.wait()
        tokens = self.landing.tokens.tolist()
        ids: list[int | None] = [None] * self.num_chunks
        logprobs: list[TokenLogprobs | None] = [None] * self.num_chunks
        for chunk, row in self.sampled:
            ids[chunk] = tokens[row]
        if self.landing.logprobs is not None:
            found = self.landing.logprobs.results()
            for chunk, row in self.sampled:
                logprobs[chunk] = found.get(row)
        return StepResult(ids, logprobs)
