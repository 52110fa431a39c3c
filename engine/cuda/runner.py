"""The Executor of one GPU: queues a step and returns before it is computed.

Tokens that a step draws stay on the device and feed the next; the host reads them one step late
from pinned memory. Nothing in `submit` waits for the device but the copies of the step before out
of pinned memory, which were made when that step began.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from core.sampling import SamplingParams
from engine.cuda.attention import (
    CudaContext,
    FlashInferAttention,
    RowCounts,
    blocks_of,
    row_order,
)
from engine.cuda.graphs import DecodeSteps, pad_rows
from engine.cuda.inputs import StepInputs
from engine.cuda.kernels.tokens import resolve_tokens
from engine.cuda.landing import Landing, LandingStep
from engine.cuda.sampling import Sampler, draw_plain, needs_more
from engine.cuda.step_writer import StepWriter, write_draws
from engine.executor import PendingStep
from engine.kv.pool import KVPool
from engine.layers.decoder import DecoderModel
from engine.models.config import ModelConfig
from engine.plan import Chunk, SampleSpec, StepPlan
from engine.sampler.prompt_logprobs import PromptScores, score_prompts

_UNUSED: Final = SampleSpec(SamplingParams(temperature=0), 0, (), ())
"""Of rows that nobody reads."""
_TILED: Final = (16, 32, 64, 128)
"""Numbers of tokens for which products of few rows are divided differently, at the most."""


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
        self._max_tokens = limits.max_tokens
        self._attention = attention
        self._writer = StepWriter(self._block_size, max_rows)
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
        self._sampled_rows: dict[str, int] = {}
        # A step's tokens are read while the next one's are under way.
        self._landings = [Landing(max_rows, device), Landing(max_rows, device)]
        self._decodes = DecodeSteps(
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
    def ranks(self) -> None:
        """See Executor. Who knows of other ranks is MultiProcessExecutor."""

    @property
    def overlaps(self) -> bool:
        """See Executor."""
        return True

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingStep:
        """See Executor."""
        assert self._model is not None, "submit after close"
        chunks = plan.chunks
        if all(len(chunk.token_ids) == 1 and chunk.score is None for chunk in chunks):
            step = self._run_decodes(chunks)
        else:
            step = self._run_mixed(chunks)
        logprobs = None
        if any(map(needs_more, step.specs)):
            logprobs = self._sampler.draw(step.logits, step.specs, self._last_tokens)
        sampled = [(i, row) for row, i in enumerate(step.drawn) if chunks[i].sample is not None]
        self._sampled_rows = {chunks[i].request_id: row for i, row in sampled}
        landing = self._landings[0]
        self._landings.reverse()
        landing.fetch(self._last_tokens[: len(step.drawn)], logprobs, step.scores)
        return LandingStep(landing, len(chunks), sampled)

    def close(self) -> None:
        """See Executor. The pool's memory stays until nobody refers to it."""
        self._decodes.close()
        self._model = None
        self._pool.close()

    def rehearse(self, num_tokens: int, max_len: int) -> None:
        """Run the largest steps on padding, which writes no K and V, and wait for them."""
        with torch.inference_mode():
            self._decodes.rehearse(self._max_rows)
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
        """Build every kernel and capture the graphs, so that no request has to wait for it."""
        with torch.inference_mode():
            self._decodes.capture_all(progress)
            progress("building what other steps need")
            room = max(1, min(self._max_rows, self._max_tokens // 2))
            mixture = self._run_mixed(_one_of_each()[:room], write=False)
            self._sampler.rehearse(mixture.logits)
        for num_tokens in _TILED:
            self.rehearse(min(num_tokens, self._max_tokens), self._block_size)

    def _run_decodes(self, chunks: Sequence[Chunk]) -> "_Queued":
        """Every chunk has a row of logits, whether it is to be sampled or not."""
        order = row_order(chunks)
        chunks = [chunks[i] for i in order]
        inputs, count = self._decode_inputs, len(chunks)
        inputs.reuse()
        num_blocks = self._writer.write(inputs, chunks, self._sampled_rows).num_blocks
        specs = [chunk.sample or _UNUSED for chunk in chunks]
        write_draws(inputs, specs)
        size = self._decodes.padded(count)
        if size > count:
            num_blocks = pad_rows(inputs, count, size, num_blocks)
        inputs.send(num_blocks)
        self._decodes.plan(size)
        inputs.sent()
        return _Queued(order, specs, self._decodes.run(size)[:count])

    def _run_mixed(self, chunks: Sequence[Chunk], *, write: bool = True) -> "_Queued":
        order = row_order(chunks)
        chunks = [chunks[i] for i in order]
        inputs = self._mixed_inputs
        inputs.reuse()
        step = self._writer.write(inputs, chunks, self._sampled_rows)
        if not write:
            inputs.slots[: step.num_tokens] = -1
        drawn = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
        specs = [spec for i in drawn if (spec := chunks[i].sample) is not None]
        write_draws(inputs, specs)
        # A step that samples nothing still computes one row: with several ranks, its sums are what
        # tells rank 0 that all KV is written.
        num_rows = max(1, len(drawn))
        inputs.output_rows[:num_rows] = step.last_rows[drawn] if drawn else 0
        inputs.send(step.num_blocks)
        prompts = step.lengths > 1
        rows = RowCounts(
            step.lengths,
            num_decodes=int(np.count_nonzero(~prompts)),
            num_resumed=int(np.count_nonzero(prompts & (step.context_lens > step.lengths))),
        )
        block_ids = inputs.device_block_ids[: step.num_blocks]
        parts = self._attention.plan_mixed(rows, step.context_lens, block_ids)
        inputs.sent()
        output_rows = inputs.device_output_rows[:num_rows]
        scoring = any(chunk.score is not None for chunk in chunks)
        context = CudaContext(
            parts=parts,
            cos_sin=self._cos_sin,
            positions=inputs.device_positions[: step.num_tokens],
            slots=inputs.device_slots[: step.num_tokens],
            output_rows=None if scoring else output_rows,
        )
        hidden = self._forward(inputs, context, step.num_tokens)
        scores = None
        if scoring:
            assert self._model is not None
            first_rows = (step.last_rows - step.lengths + 1).tolist()
            scored = score_prompts(self._model.logits, hidden, chunks, first_rows)
            scores = replace(scored, specs=[(order[i], spec) for i, spec in scored.specs])
            hidden = hidden.index_select(0, output_rows)
        logits = self._draw(inputs, hidden)
        return _Queued([order[i] for i in drawn], specs, logits, scores)

    def _compute_decodes(self, inputs: StepInputs, context: CudaContext, rows: int) -> torch.Tensor:
        return self._draw(inputs, self._forward(inputs, context, rows))

    def _forward(self, inputs: StepInputs, context: CudaContext, num_tokens: int) -> torch.Tensor:
        """Queue the layers. Returns the hidden states of the context's output rows."""
        assert self._model is not None
        token_ids = resolve_tokens(
            inputs.device_token_ids[:num_tokens],
            inputs.device_source_rows[:num_tokens],
            self._last_tokens,
        )
        return self._model.forward(token_ids, context)

    def _draw(self, inputs: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
        """Queue the LM head and the draws of [num_rows, hidden_size]. Returns all their logits."""
        assert self._model is not None
        num_rows = len(hidden)
        logits = self._model.logits(hidden)
        draw_plain(
            logits,
            inputs.device_temperatures[:num_rows],
            inputs.device_seeds[:num_rows],
            inputs.device_draw_positions[:num_rows],
            self._last_tokens[:num_rows],
        )
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How large a step can be."""

    max_tokens: int
    max_rows: int
    max_table_entries: int
    """Blocks in all tables of a step together; blocks shared by several sequences count again."""


def _one_of_each() -> list[Chunk]:
    """A decode, a chunk of a prompt that has begun and a fresh one, of blocks of any size."""
    table = [0, 0, 0]
    return [
        Chunk("rehearsal-decode", [0], 1, table, _UNUSED),
        Chunk("rehearsal-resumed", [0, 0], 1, table, _UNUSED),
        Chunk("rehearsal-fresh", [0, 0], 0, table, _UNUSED),
    ]


@dataclass(frozen=True, slots=True)
class _Queued:
    """A step on its way through the device."""

    drawn: Sequence[int]
    """Which chunk each row of logits belongs to."""
    specs: Sequence[SampleSpec]
    """One per row."""
    logits: torch.Tensor
    scores: PromptScores | None = None
