"""The GPU runner without a GPU: kernels in triton's interpreter, attention written out in torch.

Attention here goes by nothing but what FlashInfer would be told of a step: where tables start,
which blocks they name, how many tokens the last one holds.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.build import build_executor
from engine.config import EngineConfig
from engine.cuda.attention import (
    AttentionParts,
    DecodeAttention,
    FlashInferAttention,
    RowCounts,
    blocks_of,
    last_block_lens,
)
from engine.cuda.inputs import Int32s, StepInputs
from engine.cuda.runner import CudaRunner, StepLimits
from engine.kv.pool import KVPool
from engine.layers.experts import ExpertMLP
from engine.layers.rope import cos_sin_table
from engine.runner import TorchRunner


class _Plan:
    """What a FlashInfer wrapper keeps of a plan, as it was when it was made."""

    starts: torch.Tensor
    block_ids: torch.Tensor
    last_lens: torch.Tensor
    lengths: list[int]


class WrittenOutAttention(FlashInferAttention):
    """Stands in for FlashInfer."""

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        layout = pool.layout
        self.layers = [pool.tensor[:, layer] for layer in range(layout.num_layers)]
        self._num_heads, self._num_kv_heads = num_heads, layout.num_kv_heads
        self._block_size = layout.block_size

    def decodes(self, batch_size: int, inputs: StepInputs) -> DecodeAttention:
        step = _Plan()

        def plan(starts: Int32s, last_lens: Int32s) -> None:
            # What the device has must be what is planned: graphs read tables there.
            assert torch.equal(inputs.device_table_starts[: batch_size + 1], torch.tensor(starts))
            assert torch.equal(inputs.device_last_lens[:batch_size], torch.tensor(last_lens))
            self._fill(step, torch.tensor(starts), inputs.device_block_ids, torch.tensor(last_lens))

        return DecodeAttention(AttentionParts(self, None, (step, None, None)), plan)

    def _fill(
        self,
        step: _Plan,
        starts: torch.Tensor,
        block_ids: torch.Tensor,
        last_lens: torch.Tensor,
    ) -> None:
        step.starts, step.last_lens = starts.clone(), last_lens.clone()
        step.block_ids = block_ids.clone()
        step.lengths = [1] * len(last_lens)

    def plan_mixed(
        self, rows: RowCounts, context_lens: Any, block_ids: torch.Tensor
    ) -> AttentionParts:
        counts = blocks_of(context_lens, self._block_size)
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        last_lens = torch.from_numpy(last_block_lens(context_lens, self._block_size))
        first, last = rows.num_decodes, rows.num_decodes + rows.num_resumed

        def plan(begin: int, end: int) -> _Plan | None:
            if begin == end:
                return None
            part = _Plan()
            self._fill(part, starts[begin : end + 1], block_ids, last_lens[begin:end])
            part.lengths = rows.lengths[begin:end].tolist()
            return part

        wrappers = (plan(0, first), plan(first, last), plan(last, len(rows.lengths)))
        return AttentionParts(self, rows.ends, wrappers)

    def run(self, wrapper: Any, query: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        kv, row = self.layers[layer], 0
        for index, length in enumerate(wrapper.lengths):
            first, last = int(wrapper.starts[index]), int(wrapper.starts[index + 1])
            blocks = wrapper.block_ids[first:last].long()
            count = (len(blocks) - 1) * self._block_size + int(wrapper.last_lens[index])
            key, value = (kv[blocks, part].transpose(1, 2).flatten(0, 1)[:count] for part in (0, 1))
            rows = slice(row, row + length)
            out[rows] = self._attend(query[rows], key, value).to(out.dtype)
            row += length

    def run_fresh(self, wrapper: Any, qkv: torch.Tensor, out: torch.Tensor) -> None:
        rotated, row = self._num_heads + self._num_kv_heads, 0
        for length in wrapper.lengths:
            part = qkv[row : row + length]
            query, key = part[:, : self._num_heads], part[:, self._num_heads : rotated]
            done = self._attend(query, key, part[:, rotated:])
            out[row : row + length] = done.to(out.dtype)
            row += length

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        group = self._num_heads // self._num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", query, key) / math.sqrt(query.shape[-1])
        ends = torch.arange(len(key) - len(query), len(key))
        hidden = torch.arange(len(key)) > ends[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, value)


def build_cuda_runner_on_cpu(path: Path, config: EngineConfig) -> CudaRunner:
    """The runner over a checkpoint in float32, its pool as `config` says."""
    plain = build_executor(config)
    assert isinstance(plain, TorchRunner) and plain._model is not None
    for layer in plain._model.layers:
        if isinstance(layer.mlp, ExpertMLP):
            layer.mlp._fused = True
    model = plain.model_config
    rows = config.max_num_seqs or 8
    return CudaRunner(
        model=plain._model,
        model_config=model,
        model_digest=plain.model_digest,
        attention=WrittenOutAttention(plain.pool, model.num_heads),
        pool=plain.pool,
        cos_sin=cos_sin_table(model.rope, model.head_dim, model.max_position, torch.device("cpu")),
        limits=StepLimits(
            max_tokens=config.max_step_tokens or 64,
            max_rows=rows,
            max_table_entries=rows * -(-model.max_position // config.block_size),
        ),
        cuda_graphs=False,
    )
