"""The KV pool: memory for all KV blocks of a worker, and how a block lies in it.

The runner owns it; attention reads and writes it through `tensor`; a transport moves whole blocks
and sees only addresses. Which block belongs to whom is the allocator's business.
"""

import mmap
from typing import TYPE_CHECKING

import torch

from core.errors import ConfigError
from core.kv_layout import KvLayout
from engine.config import EngineConfig
from engine.models.config import ModelConfig

if TYPE_CHECKING:  # it lies below a pool, so it is made from one
    from engine.executor import HostMemory

_DEFAULT_BYTES = 1 << 30
"""Where nothing else is said and nothing is measured; see engine.cuda.memory."""


def kv_layout(config: ModelConfig, block_size: int, dtype: torch.dtype) -> KvLayout:
    """Layout of a model's blocks."""
    elements = config.num_layers * 2 * config.num_kv_heads * block_size * config.head_dim
    return KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype=str(dtype).removeprefix("torch."),
        block_bytes=elements * dtype.itemsize,
    )


def num_pool_blocks(config: EngineConfig, layout: KvLayout) -> int:
    """Blocks that the pool gets: as configured, or as many as fit `kv_cache_bytes`.

    Raises:
        ConfigError: not even one block fits.
    """
    if config.num_blocks is not None:
        if config.num_blocks < 1:
            raise ConfigError(f"num_blocks must be at least 1, got {config.num_blocks}.")
        return config.num_blocks
    size = _DEFAULT_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
    count = size // layout.block_bytes
    if count < 1:
        raise ConfigError(
            f"kv_cache_bytes of {size} does not hold one KV block of "
            f"{layout.block_bytes} bytes; give at least that much."
        )
    return count


class KVPool:
    """Contiguous memory for `num_blocks` blocks, zero at first."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        """Reserve the memory; host memory is page-aligned and becomes resident as it is used."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.host_memory: HostMemory | None = None
        """For blocks that leave the pool; set once, by who builds the runner."""
        dtype: torch.dtype = getattr(torch, layout.dtype)
        shape = (
            num_blocks,
            layout.num_layers,
            2,
            layout.num_kv_heads,
            layout.block_size,
            layout.head_dim,
        )
        # NOTE: the pool must never hold NaN where nothing was written: attention over padding
        # multiplies such values by a probability of zero.
        if device.type == "cpu":
            # Private, because the kernel gives huge pages to shared memory only if told to.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, num_blocks * layout.block_bytes, flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def close(self) -> None:
        """End copies to and from host memory. The memory stays until nobody refers to it."""
        if self.host_memory is not None:
            self.host_memory.close()

    @property
    def base_address(self) -> int:
        """Address of block 0 in bytes."""
        return self.tensor.data_ptr()

    @property
    def device_id(self) -> int | None:
        """CUDA device index, or None for host memory."""
        return self.tensor.device.index if self.tensor.is_cuda else None
