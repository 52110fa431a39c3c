"""Attention by FlashInfer over the block-major pool.

Decodes run on its tensor-core kernel, which reads K and V at the speed of memory; prompt chunks on
its FlashAttention-3 kernel where the GPU has one (Hopper), else FlashAttention-2. A plan is made
once per step and shared by all layers. Plans of decodes lie in buffers that CUDA graphs may read.
Prompts of which nothing was computed before attend to K and V as they were projected, which spares
finding them in the pool.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.cuda.kernels.qkv import prepare_qkv_
from engine.cuda.support import has_dependent_launch
from engine.kv.pool import KVPool
from engine.layers.norm import RMSNorm

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
        self._device = device
        self._num_heads = num_heads
        self._num_kv_heads = layout.num_kv_heads
        self._head_dim = layout.head_dim
        self._block_size = layout.block_size
        self._dtype = pool.tensor.dtype
        self.layers = [pool.tensor[:, layer] for layer in range(layout.num_layers)]
        self._overlap = has_dependent_launch(device)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode_plan = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device)
        self._prompts = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "HND", backend="fa3" if self._overlap else "fa2"
        )
        self._whole_prompts = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            self._workspace, "NHD", backend="fa3" if self._overlap else "fa2"
        )
        self._mixed_decodes = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=True
        )

    def decodes(self, batch_size: int, block_ids: torch.Tensor) -> "DecodeAttention":
        """Attention of steps of exactly `batch_size` single tokens, for one CUDA graph.

        Args:
            batch_size: rows, padding included.
            block_ids: [n] int32, where each step's tables will lie on the device.
        """
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._int32(batch_size + 1),
            paged_kv_indices_buffer=block_ids,
            paged_kv_last_page_len_buffer=self._int32(batch_size),
        )
        # One of them is in use at a time, so they need not have a plan buffer each.
        wrapper.reset_workspace_buffer(self._workspace, self._decode_plan)
        return DecodeAttention(self, wrapper)

    def plan_mixed(
        self,
        *,
        lengths: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        num_decodes: int,
        block_ids: torch.Tensor,
    ) -> "AttentionParts":
        """Plan a step that is not all decodes, or not in a graph.

        Args:
            lengths: [B] rows of each sequence, those of the first `num_decodes` are 1.
            context_lens: [B] positions that the last row of each attends to.
            num_decodes: sequences that decode.
            block_ids: [n] int32 on the device, the tables one after another.
        """
        counts = blocks_of(context_lens, self._block_size)
        starts = _indptr(counts)
        split = int(starts[num_decodes])
        last_lens = torch.from_numpy(last_block_lens(context_lens, self._block_size))
        decode = None
        if num_decodes:
            decode = self._mixed_decodes
            self.plan_decodes(
                decode,
                torch.from_numpy(starts[: num_decodes + 1]),
                block_ids[:split],
                last_lens[:num_decodes],
            )
        if num_decodes == len(lengths):
            return AttentionParts(self, num_decodes, decode, None)
        rows = torch.from_numpy(_indptr(lengths[num_decodes:]))
        if np.array_equal(lengths[num_decodes:], context_lens[num_decodes:]):
            self._whole_prompts.plan(
                rows,
                rows,
                self._num_heads,
                self._num_kv_heads,
                self._head_dim,
                causal=True,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )
            return AttentionParts(self, num_decodes, decode, self._whole_prompts, whole=True)
        self._prompts.plan(
            rows,
            torch.from_numpy(starts[num_decodes:] - split),
            block_ids[split : int(starts[-1])],
            last_lens[num_decodes:],
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            self._block_size,
            causal=True,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        return AttentionParts(self, num_decodes, decode, self._prompts)

    def plan_decodes(
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

    def run_whole(self, wrapper: Any, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """Attend among the rows of qkv [n, Hq + 2 Hkv, D] themselves; out is [n, Hq, D]."""
        rotated = self._num_heads + self._num_kv_heads
        query, key = qkv[:, : self._num_heads], qkv[:, self._num_heads : rotated]
        wrapper.run(query, key, qkv[:, rotated:], out=out)

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self._num_heads

    def _int32(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self._device)


class DecodeAttention:
    """Attention of decode steps of one size, in buffers of fixed address."""

    def __init__(self, owner: FlashInferAttention, wrapper: Any) -> None:
        self._owner = owner
        self._wrapper = wrapper
        self.parts = AttentionParts(owner, 0, wrapper, None)

    def plan(self, starts: torch.Tensor, block_ids: torch.Tensor, last_lens: torch.Tensor) -> None:
        """Plan one step.

        Args:
            starts: [B + 1] int32, host: where each table begins in block_ids.
            block_ids: the buffer given at first, cut to its used part.
            last_lens: [B] int32, host: tokens in each last block.
        """
        self._owner.plan_decodes(self._wrapper, starts, block_ids, last_lens)


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """A planned step: its first rows decode, the others are prompts."""

    owner: FlashInferAttention
    num_decodes: int
    decode: Any
    prompt: Any
    whole: bool = False
    """Prompts attend to nothing but their own rows."""

    def attend(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        """[T, Hq + 2 Hkv, D] -> [T, Hq, D]; K and V of all rows are in the pool."""
        owner = self.owner
        query = qkv[:, : owner.num_heads]
        out = torch.empty(query.shape, dtype=qkv.dtype, device=qkv.device)
        split = 0
        if self.decode is not None:
            split = len(qkv) if self.prompt is None else self.num_decodes
            owner.run(self.decode, query[:split], layer, out[:split])
        if self.whole:
            owner.run_whole(self.prompt, qkv[split:], out[split:])
        elif self.prompt is not None:
            owner.run(self.prompt, query[split:], layer, out[split:])
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
