"""Runs step plans on one device of this process: the hands of the scheduler's brain.

The engine loop's thread is the only caller. A plan is taken as it is: that blocks are allocated,
hold what the plan says they hold, and are not written by two chunks is the scheduler's promise.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from core.tokens import TokenLogprobs
from engine.attention.interface import AttentionBackend, AttentionSpan
from engine.executor import DoneStep, PendingStep
from engine.kernels.decode import CompiledDecode
from engine.kv.pool import KVPool
from engine.layers.context import TorchContext
from engine.layers.decoder import DecoderModel
from engine.layers.rope import RotaryEmbedding
from engine.models.config import ModelConfig
from engine.plan import Chunk, StepPlan, StepResult
from engine.sampler.prompt_logprobs import score_prompts
from engine.sampler.sampler import sample


class TorchRunner:
    """The Executor of one device in plain torch: any CPU, and GPUs without FlashInfer."""

    def __init__(
        self,
        *,
        model: DecoderModel,
        model_config: ModelConfig,
        model_digest: bytes,
        pool: KVPool,
        attention: AttentionBackend,
        rope: RotaryEmbedding,
        num_heads: int,
        compiled: CompiledDecode | None = None,
    ) -> None:
        """Put the parts together; `build_rank` makes them. `num_heads` are those of this rank."""
        self._model: DecoderModel | None = model
        self._model_config = model_config
        self._model_digest = model_digest
        self._pool = pool
        self._attention = attention
        self._rope = rope
        self._compiled = compiled
        self._num_heads = num_heads
        self._device = pool.tensor.device

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
        """See Executor. A step is computed when it is submitted."""
        return False

    def submit(self, plan: StepPlan) -> PendingStep:
        """See Executor."""
        with torch.inference_mode():
            return DoneStep(self._execute(plan.chunks))

    def close(self) -> None:
        """See Executor. The pool's memory stays until nobody refers to it."""
        self._model = self._compiled = None
        self._pool.close()

    def _execute(self, chunks: Sequence[Chunk]) -> StepResult:
        assert self._model is not None, "execute after close"
        if self._compiled is not None and self._compiled.takes(chunks):
            rows = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
            logits = self._compiled.logits(chunks)
            return _sample(chunks, rows, logits if len(rows) == len(chunks) else logits[rows])
        # Decodes first and by length: attention batches neighbours of similar length.
        order = sorted(
            range(len(chunks)),
            key=lambda i: (len(chunks[i].token_ids) > 1, chunks[i].start),
        )
        spans: list[AttentionSpan] = []
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        last_rows: list[int] = []
        first_rows = [0] * len(chunks)
        for index in order:
            chunk = chunks[index]
            length = len(chunk.token_ids)
            first_rows[index] = len(token_ids)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + length))
            spans.append(AttentionSpan(chunk.start, length, chunk.block_table))
            if chunk.sample is not None:
                sampled.append(index)
                last_rows.append(len(token_ids) - 1)
        # A step that samples nothing still computes one row: with several ranks, its sums are what
        # tells rank 0 that all KV is written.
        scoring = any(chunk.score is not None for chunk in chunks)
        some = len(last_rows) < len(token_ids) and not scoring
        output_rows = self._tensor(last_rows or [0]) if some else None
        cos, sin = self._rope.rows(self._tensor(positions))
        context = TorchContext(
            cos=cos,
            sin=sin,
            attention=self._attention.plan(spans),
            num_heads=self._num_heads,
            num_kv_heads=self._pool.layout.num_kv_heads,
            output_rows=output_rows,
        )
        hidden = self._model.forward(self._tensor(token_ids), context)
        if not scoring:
            return _sample(chunks, sampled, self._model.logits(hidden) if sampled else hidden)
        scored = score_prompts(self._model.logits, hidden, chunks, first_rows)
        scores = replace(scored, packed=scored.packed.cpu()).results()
        hidden = hidden.index_select(0, self._tensor(last_rows)) if sampled else hidden
        result = _sample(chunks, sampled, self._model.logits(hidden) if sampled else hidden)
        return replace(result, scores=scores)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)


def _sample(chunks: Sequence[Chunk], sampled: Sequence[int], logits: torch.Tensor) -> StepResult:
    """Sample for the chunks whose indices are given, from one row of logits each."""
    ids: list[int | None] = [None] * len(chunks)
    logprobs: list[TokenLogprobs | None] = [None] * len(chunks)
    if sampled:
        specs = [spec for i in sampled if (spec := chunks[i].sample) is not None]
        for index, result in zip(sampled, sample(logits, specs), strict=True):
            ids[index], logprobs[index] = result.token_id, result.logprobs
    return StepResult(ids, logprobs)
