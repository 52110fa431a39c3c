"""How much of a GPU's memory the KV pool may have: what is left after everything else was tried.

Before the pool exists the largest steps are run once over a pool of one block; what they needed at
their peak stays free for them. So a worker that has started does not run out of memory later.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from core.errors import ConfigError
from core.kv_layout import KvLayout
from engine.config import EngineConfig

_GIB = 1 << 30
_GRAPH_BYTES = 8 << 20
"""Of one CUDA graph with its kernels' parameters; 21 graphs of Llama-8B took less than half."""
_SLACK_BYTES = 256 << 20
"""For fragmentation of torch's allocator."""


@contextmanager
def explained(what: str, device: torch.device) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"{device} ran out of memory while {what}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB "
            "were free at the end. Spread the model over more GPUs (tensor_parallel_size), lower "
            "max_step_tokens or max_num_seqs, or end what else uses this GPU."
        ) from error


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """Bytes by which `work` raises the memory in use at its peak; all is given back."""
    _tidy()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    _tidy()
    return peak


def affordable_blocks(
    config: EngineConfig,
    layout: KvLayout,
    device: torch.device,
    *,
    step_bytes: int,
    num_graphs: int,
    max_len: int,
) -> int:
    """Blocks that fit beside weights, the largest step and CUDA graphs.

    Args:
        config: gpu_memory_utilization is the share of the whole GPU that may be used.
        layout: of a block.
        device: with the weights on it.
        step_bytes: that the largest step needs at its peak.
        num_graphs: to be captured.
        max_len: the longest sequence in tokens.

    Raises:
        ConfigError: one sequence of the longest length would not fit.
    """
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    reserved = step_bytes + num_graphs * _GRAPH_BYTES + _SLACK_BYTES
    left = int(total * config.gpu_memory_utilization) - used - reserved
    count = max(0, left) // layout.block_bytes
    needed = -(-max_len // layout.block_size)
    if count < needed:
        fits = count * layout.block_size
        raise ConfigError(
            f"{max(0, left) / _GIB:.1f} GiB are left for KV on {device} ({total / _GIB:.1f} GiB, of"
            f" which {used / _GIB:.1f} hold weights and what else runs there, and "
            f"{reserved / _GIB:.1f} are for computing): {fits} tokens, but max_model_len is "
            f"{max_len}. Set max_model_len to at most {fits}, raise gpu_memory_utilization (now "
            f"{config.gpu_memory_utilization}), lower max_step_tokens or use more GPUs "
            "(tensor_parallel_size)."
        )
    return count


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()
