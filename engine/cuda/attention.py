"""Attention by FlashInfer over the block-major pool.

Decodes run on its tensor-core kernel, which reads K and V at the speed of memory; prompt chunks on
its FlashAttention-3 kernel where the GPU has one (Hopper), else FlashAttention-2. A plan is made
once per step and shared by all layers. Plans of decodes lie in buffers that CUDA graphs may read.
Prompts of which nothing was computed before attend to K and V as they were projected, which spares
finding them in the pool.

Rows come in the order of `row_order`. Among decodes the longest context comes first: a program
takes one context whole when there are more of them than programs fit on the GPU, in this order, so
the short ones fill the gaps at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.cuda.decode_plan import DecodePlan
from engine.cuda.inputs import Int32s, StepInputs
from engine.cuda.kernels.qkv import prepare_qkv_
from engine.cuda.support import has_dependent_launch
from engine.kv.pool import KVPool
from engine.layers.norm import RMSNorm
from engine.plan import Chunk

_WORKSPACE_BYTES = 256 << 20
"""For partial results of contexts that are split between programs."""
_PLAN_BYTES = 8 << 20
"""FlashInfer's own size for a plan."""


class FlashInferAttention:
    """Plans steps over one pool."""

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        """Bind to the pool of a model with `num_heads` query heads."""
        import flashinfer

        layout, device = pool.layout, pool.tensor.device
        self._flashinfer = flashinfer
        self._num_heads = num_heads
        self._num_kv_heads = layout.num_kv_heads
        self._head_dim = layout.head_dim
        self._block_size = layout.block_size
        self._dtype = pool.tensor.dtype
        self.layers = [pool.tensor[:, layer] for layer in range(layout.num_layers)]
        self._overlap = has_dependent_launch(device)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode_plan = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device)
        self._resumed_prompts = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "HND", backend="fa3" if self._overlap else "fa2"
        )
        self._fresh_prompts = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            self._workspace, "NHD", backend="fa3" if self._overlap else "fa2"
        )
        self._mixed_decodes = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=True
        )

    def decodes(self, batch_size: int, inputs: StepInputs) -> "DecodeAttention":
        """Attention of steps of exactly `batch_size` single tokens, for one CUDA graph.

        Args:
            batch_size: rows, padding included.
            inputs: where each step's tables will lie on the device.
        """
        starts = inputs.device_table_starts[: batch_size + 1]
        last_lens = inputs.device_last_lens[:batch_size]
        block_ids = inputs.device_block_ids
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=starts,
            paged_kv_indices_buffer=block_ids,
            paged_kv_last_page_len_buffer=last_lens,
        )
        # One of them is in use at a time, so they need not have a plan buffer each.
        wrapper.reset_workspace_buffer(self._workspace, self._decode_plan)
        one_each = torch.arange(batch_size + 1, dtype=torch.int32)
        self._plan_decodes(wrapper, one_each, block_ids[:batch_size], torch.ones_like(one_each[1:]))
        plan = DecodePlan(
            wrapper,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            block_size=self._block_size,
        )
        return DecodeAttention(AttentionParts(self, None, (wrapper, None, None)), plan)

    def plan_mixed(
        self, rows: "RowCounts", context_lens: npt.NDArray[np.int32], block_ids: torch.Tensor
    ) -> "AttentionParts":
        """Plan a step that is not all decodes, or not in a graph.

        Args:
            rows: of each sequence, in the order of `row_order`.
            context_lens: [B] positions that the last row of each attends to.
            block_ids: [n] int32 on the device, the tables one after another.
        """
        starts = _indptr(blocks_of(context_lens, self._block_size))
        last_lens = torch.from_numpy(last_block_lens(context_lens, self._block_size))
        decode = resumed = fresh = None
        if first := rows.num_decodes:
            decode = self._mixed_decodes
            tables = torch.from_numpy(starts[: first + 1])
            self._plan_decodes(decode, tables, block_ids[: starts[first]], last_lens[:first])
        last = first + rows.num_resumed
        heads = (self._num_heads, self._num_kv_heads, self._head_dim)
        types = {"q_data_type": self._dtype, "kv_data_type": self._dtype}
        if rows.num_resumed:
            resumed = self._resumed_prompts
            resumed.plan(
                torch.from_numpy(_indptr(rows.lengths[first:last])),
                torch.from_numpy(starts[first : last + 1] - starts[first]),
                block_ids[starts[first] : starts[last]],
                last_lens[first:last],
                *heads,
                self._block_size,
                causal=True,
                **types,
            )
        if last < len(rows.lengths):
            fresh = self._fresh_prompts
            ends = torch.from_numpy(_indptr(rows.lengths[last:]))
            fresh.plan(ends, ends, *heads, causal=True, **types)
        return AttentionParts(self, rows.ends, (decode, resumed, fresh))

    def _plan_decodes(
        self,
        wrapper: Any,
        starts: torch.Tensor,
        block_ids: torch.Tensor,
        last_lens: torch.Tensor,
    ) -> None:
        """Have FlashInfer divide decodes among programs; the three arrays as it names them."""
        wrapper.plan(
            starts,
            block_ids,
            last_lens,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            self._block_size,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

    def run(self, wrapper: Any, query: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        """Attend to what is in the pool: [n, Hq, D] -> out, the same shape."""
        kv = self.layers[layer]
        wrapper.run(query, (kv[:, 0], kv[:, 1]), out=out, enable_pdl=self._overlap)

    def run_fresh(self, wrapper: Any, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """Attend among the rows of qkv [n, Hq + 2 Hkv, D] themselves; out is [n, Hq, D]."""
        rotated = self._num_heads + self._num_kv_heads
        query, key = qkv[:, : self._num_heads], qkv[:, self._num_heads : rotated]
        wrapper.run(query, key, qkv[:, rotated:], out=out)

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self._num_heads


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """Attention of decode steps of one size, in buffers of fixed address."""

    parts: "AttentionParts"
    plan: Callable[[Int32s, Int32s], None]
    """Plans one step, see DecodePlan."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How the rows of a step are divided: decodes, then resumed prompts, then fresh ones."""

    lengths: npt.NDArray[np.int32]
    """[B] rows of each sequence, 1 for each decode."""
    num_decodes: int
    num_resumed: int
    """Sequences that attend to more than their own rows of this step."""

    @property
    def ends(self) -> tuple[int, int]:
        """Where the rows of decodes end, and those of resumed prompts."""
        resumed = self.lengths[self.num_decodes : self.num_decodes + self.num_resumed]
        return self.num_decodes, self.num_decodes + int(resumed.sum())


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """A planned step."""

    owner: FlashInferAttention
    ends: tuple[int, int] | None
    """See RowCounts; None means decodes only, rows of padding among them."""
    wrappers: tuple[Any, Any, Any]
    """FlashInfer's for decodes, resumed and fresh prompts; None where there are no rows."""

    def attend(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        """[T, Hq + 2 Hkv, D] -> [T, Hq, D]; K and V of all rows are in the pool."""
        owner = self.owner
        query = qkv[:, : owner.num_heads]
        out = torch.empty(query.shape, dtype=qkv.dtype, device=qkv.device)
        first, last = self.ends or (len(qkv), len(qkv))
        decode, resumed, fresh = self.wrappers
        if decode is not None:
            owner.run(decode, query[:first], layer, out[:first])
        if resumed is not None:
            owner.run(resumed, query[first:last], layer, out[first:last])
        if fresh is not None:
            owner.run_fresh(fresh, qkv[last:], out[last:])
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaContext:
    """The ForwardContext of a step on a GPU; see engine.layers.context."""

    parts: AttentionParts
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    output_rows: torch.Tensor | None

    def attend(
        self, qkv: torch.Tensor, norms: tuple[RMSNorm, RMSNorm] | None, layer: int
    ) -> torch.Tensor:
        """See ForwardContext."""
        weights = (norms[0].weight, norms[1].weight, norms[0].eps) if norms else None
        kv = self.parts.owner.layers[layer]
        prepare_qkv_(qkv, weights, self.cos_sin, self.positions, self.slots, kv)
        return self.parts.attend(qkv, layer).flatten(1)


def row_order(chunks: Sequence[Chunk]) -> list[int]:
    """In which order the chunks of a step go into rows: see RowCounts, decodes by context."""
    return sorted(range(len(chunks)), key=lambda index: _place(chunks[index]))


def _place(chunk: Chunk) -> tuple[int, int]:
    if len(chunk.token_ids) == 1:
        return 0, -chunk.start
    return (1 if chunk.start else 2), 0


def blocks_of(context_lens: npt.NDArray[np.int32], block_size: int) -> npt.NDArray[np.int32]:
    """Blocks that hold each context."""
    counts: npt.NDArray[np.int32] = (context_lens + (block_size - 1)) // block_size
    return counts


def last_block_lens(context_lens: npt.NDArray[np.int32], block_size: int) -> npt.NDArray[np.int32]:
    """Tokens in the last block of each context, 1 to block_size."""
    lens: npt.NDArray[np.int32] = (context_lens - 1) % block_size + 1
    return lens


def _indptr(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts
