"""How much of a GPU's memory the KV pool may have: what is left after everything else was tried.

Before the pool exists the largest steps are run once over a pool of one block; what they needed at
their peak stays free for them. So a worker that has started does not run out of memory later.

An engine counts its own use, not the GPU's: several may share one, and each keeps to its share
whatever the others are doing meanwhile. What is free bounds it as well.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from core.errors import ConfigError
from core.kv_layout import KvLayout

_GIB = 1 << 30
_CONTEXT_BYTES = _GIB
"""Of a process's CUDA context, loaded kernels and NCCL's buffers: what torch does not count."""
_GRAPH_BYTES = 8 << 20
"""Of one CUDA graph with its kernels' parameters; 21 graphs of Llama-8B took less than half."""
_SLACK_BYTES = 256 << 20
"""For fragmentation of torch's allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """A GPU's memory at one moment, in bytes."""

    total: int
    free: int
    """Of all processes together."""
    own: int
    """That this process has taken: weights, as a rule, and what CUDA itself needs."""


def gpu_memory(device: torch.device) -> GpuMemory:
    """As it is now."""
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(
        total=total, free=free, own=torch.cuda.memory_reserved(device) + _CONTEXT_BYTES
    )


@contextmanager
def explained(
    what: str, device: torch.device, memory: Callable[[torch.device], GpuMemory] = gpu_memory
) -> Iterator[None]:
    """Turn running out of a GPU's memory into an error that says what to change.

    Args:
        what: is being done meanwhile, as in "loading the weights".
        device: on which.
        memory: is asked if it happens.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        now = memory(device)
        raise ConfigError(
            f"{device} ran out of memory while {what}: {now.free / _GIB:.1f} of "
            f"{now.total / _GIB:.1f} GiB were free at the end. Spread the model over more GPUs "
            "(tensor_parallel_size), lower max_step_tokens or max_num_seqs, or end what else uses "
            "this GPU."
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """True for torch's own allocator, and for a CUDA call that it knows nothing of."""
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


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
    layout: KvLayout,
    memory: GpuMemory,
    *,
    utilization: float,
    step_bytes: int,
    num_graphs: int,
    max_len: int,
) -> int:
    """Blocks that fit beside weights, the largest step and CUDA graphs. Pure.

    Args:
        layout: of a block.
        memory: of the GPU, with the weights on it and nothing else of this engine.
        utilization: share of the whole memory that this engine may take, in (0, 1].
        step_bytes: that the largest step needs at its peak.
        num_graphs: to be captured.
        max_len: the longest sequence in tokens.

    Raises:
        ConfigError: one sequence of the longest length would not fit, or the share is no share.
    """
    if not 0 < utilization <= 1:
        raise ConfigError(
            f"gpu_memory_utilization is a share above 0 and up to 1, got {utilization}."
        )
    reserved = step_bytes + num_graphs * _GRAPH_BYTES + _SLACK_BYTES
    allowed = int(memory.total * utilization)
    left = max(0, min(allowed - memory.own, memory.free) - reserved)
    count = left // layout.block_bytes
    if count * layout.block_size >= max_len:
        return count
    others = memory.total - memory.free - memory.own
    fits = count * layout.block_size
    raise ConfigError(
        f"{left / _GIB:.1f} GiB are left for KV, which is {fits} tokens, but max_model_len is "
        f"{max_len}. Of the GPU's {memory.total / _GIB:.1f} GiB this engine may take "
        f"{allowed / _GIB:.1f} (gpu_memory_utilization {utilization:g}); weights and CUDA take "
        f"{memory.own / _GIB:.1f}, computing {reserved / _GIB:.1f}, other processes "
        f"{max(0, others) / _GIB:.1f}. {_remedy(fits)}"
    )


def _remedy(fits: int) -> str:
    shorter = f"Set max_model_len to at most {fits}, raise" if fits else "Raise"
    return (
        f"{shorter} gpu_memory_utilization, lower max_step_tokens, use more GPUs "
        "(tensor_parallel_size) or end what else uses this one."
    )


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()
