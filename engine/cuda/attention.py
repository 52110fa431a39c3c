"""Attention by FlashInfer over the block-major pool.

Decodes run on its tensor-core kernel, which reads K and V at the speed of memory; prompt chunks on
its FlashAttention-3 kernel where the GPU has one (Hopper), else FlashAttention-2. A plan is made
once per step and shared by all layers. Plans of decodes lie in buffers that CUDA graphs may read.
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
        decode, prompt = None, None
        if num_decodes:
            decode = self._mixed_decodes
            self.plan_decodes(
                decode,
                torch.from_numpy(starts[: num_decodes + 1]),
                block_ids[:split],
                last_lens[:num_decodes],
            )
        if num_decodes < len(lengths):
            prompt = self._prompts
            prompt.plan(
                torch.from_numpy(_indptr(lengths[num_decodes:])),
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
        return AttentionParts(self, num_decodes, decode, prompt)

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

    def run(
        self,
        wrapper: Any,
        query: torch.Tensor,
        layer: int,
        out: torch.Tensor,
    ) -> None:
        """Attend: [n, Hq, D] -> out, the same shape."""
        kv = self.layers[layer]
        wrapper.run(query, (kv[:, 0], kv[:, 1]), out=out, enable_pdl=self._overlap)

    def _int32(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self._device)


class DecodeAttention:
    """Attention of decode steps of one size, in buffers of fixed address."""

    def __init__(self, owner: FlashInferAttention, wrapper: Any) -> None:
        self._owner = owner
        self._wrapper = wrapper
        self.parts = AttentionParts(owner, -1, wrapper, None)

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
    """-1: all rows."""
    decode: Any
    prompt: Any

    def attend(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """[T, Hq, D] -> [T, Hq, D]; K and V of all rows are in the pool."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.prompt is None:
            self.owner.run(self.decode, query, layer, out)
        elif self.decode is None:
            self.owner.run(self.prompt, query, layer, out)
        else:
            split = self.num_decodes
            self.owner.run(self.decode, query[:split], layer, out[:split])
            self.owner.run(self.prompt, query[split:], layer, out[split:])
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
        query = prepare_qkv_(qkv, weights, self.cos_sin, self.positions, self.slots, kv)
        return self.parts.attend(query, layer).flatten(1)


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
