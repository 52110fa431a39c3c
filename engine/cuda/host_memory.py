"""Host memory below a pool on a GPU: pinned, and copied by the GPU's copy engines beside the steps.

Made by `make_host_memory`, owned by the runner. Copies out and copies in have a stream each, so
that they don't wait for each other nor steps for them. Nothing orders these streams with that of
the steps: the host has seen a source's last writer end before it starts a copy, and sees the copy
end before it submits a step that reads the target.
"""

from collections.abc import Sequence

import torch

from core.errors import ConfigError
from engine.kv.pool import KVPool


class StreamCopy:
    """Implements engine.executor.BlockCopy."""

    def __init__(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        self._began = began
        self._ended = ended

    def poll(self) -> float | None:
        """See BlockCopy."""
        return self._began.elapsed_time(self._ended) / 1e3 if self._ended.query() else None


class StreamedHostMemory:
    """Implements engine.executor.HostMemory."""

    def __init__(self, pool: KVPool, num_blocks: int) -> None:
        """Reserve and pin `num_blocks` blocks for `pool`, whose layout they have.

        Raises:
            ConfigError: the memory can't be pinned.
        """
        self._device = pool.tensor.device
        self._host = KVPool(pool.layout, num_blocks, torch.device("cpu"))
        # Not torch's own pinned allocator, which would round the size up to a power of two.
        self._pinned = False
        self._pin(num_blocks * pool.layout.block_bytes)
        # Views are made once: indexing a tensor costs more than queueing a copy.
        self._pool_blocks = pool.tensor.unbind(0)
        self._host_blocks = self._host.tensor.unbind(0)
        self._out = torch.cuda.Stream(self._device)
        self._in = torch.cuda.Stream(self._device)

    @property
    def num_blocks(self) -> int:
        """See HostMemory."""
        return self._host.num_blocks

    @property
    def block_bytes(self) -> int:
        """See HostMemory."""
        return self._host.layout.block_bytes

    def save(self, block_ids: Sequence[int], host_ids: Sequence[int]) -> StreamCopy:
        """See HostMemory."""
        targets = [self._host_blocks[host_id] for host_id in host_ids]
        return self._start(self._out, targets, [self._pool_blocks[i] for i in block_ids])

    def load(self, host_ids: Sequence[int], block_ids: Sequence[int]) -> StreamCopy:
        """See HostMemory."""
        targets = [self._pool_blocks[block_id] for block_id in block_ids]
        return self._start(self._in, targets, [self._host_blocks[i] for i in host_ids])

    def close(self) -> None:
        """Let what is under way end, and unpin the memory. Idempotent."""
        if self._pinned:
            self._pinned = False
            self._out.synchronize()
            self._in.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._host.base_address)

    def _start(
        self,
        stream: torch.cuda.Stream,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
    ) -> StreamCopy:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            began.record()
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            ended.record()
        return StreamCopy(began, ended)

    def _pin(self, num_bytes: int) -> None:
        with torch.cuda.device(self._device):
            error = torch.cuda.cudart().cudaHostRegister(self._host.base_address, num_bytes, 0)
        if int(error) != 0:
            raise ConfigError(
                f"{num_bytes} bytes of host memory for KV could not be pinned (CUDA error "
                f"{int(error)}); lower host_kv_memory, or give the process more memory."
            )
        self._pinned = True
