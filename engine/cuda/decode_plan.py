"""FlashInfer's plan of decode steps of one size, kept where a CUDA graph reads it.

FlashInfer's own `plan` copies tables to the device that a step has there already, and always merges
parts of contexts, though it splits none once there are as many contexts as programs. So its planner
is called directly here, as its `plan` does. That is no public interface: the version is pinned.

In the planner's mode for graphs the grid has more programs than work, and only merging tells the
spare ones to do nothing. So contexts that are taken whole are planned in its other mode, whose grid
has one program per context and head: the same from step to step too.

Source: BatchDecodeWithPagedKVCacheWrapper.plan (decode.py) and PrefillPlan (scheduler.cuh) of
flashinfer 0.6.13.
"""

from typing import Any

import numpy as np
import torch

from engine.cuda.inputs import Int32s

_PROGRAMS_PER_PROCESSOR = 2
"""As many as the planner splits contexts into."""
_NO_WINDOW = -1
_NO_FIXED_SPLIT = -1


class DecodePlan:
    """Plans one step after the other."""

    def __init__(
        self, wrapper: Any, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
    ) -> None:
        """Take over a wrapper that was made for a CUDA graph and has planned once."""
        self._wrapper = wrapper
        batch_size = wrapper._fixed_batch_size
        properties = torch.cuda.get_device_properties(wrapper.device)
        num_programs = _PROGRAMS_PER_PROCESSOR * properties.multi_processor_count
        self._whole = batch_size >= num_programs // num_kv_heads
        self._block_size = block_size
        self._sizes = (batch_size, batch_size, num_heads, num_kv_heads, block_size)
        self._head_dims = (head_dim, head_dim)
        self._rows = torch.arange(batch_size + 1, dtype=torch.int32)

    def __call__(self, starts: Int32s, last_lens: Int32s) -> None:
        """Plan a step, and send the plan to the device without waiting.

        Args:
            starts: [B + 1], where each table begins in the step's block ids.
            last_lens: [B], tokens in each last block.
        """
        wrapper = self._wrapper
        lengths = (np.diff(starts) - 1) * self._block_size + last_lens
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer,
            self._rows,
            torch.from_numpy(starts),
            torch.from_numpy(lengths),
            *self._sizes,
            not self._whole,  # for a graph, see above
            *self._head_dims,
            False,  # causal: a single row sees everything
            _NO_WINDOW,
            _NO_FIXED_SPLIT,
            self._whole,
            0,  # programs left to another kernel
        )
