"""Host memory for blocks that leave the pool: how much, of which make, and the make for CPUs.

Made by `make_host_memory`, owned by the runner. The engine loop's thread starts and polls copies.
Where the pool lies in host memory itself they run in a thread of their own.
"""

import ctypes
import os
import queue
import threading
import time
from collections.abc import Sequence

import torch

from core.errors import ConfigError
from core.kv_layout import KvLayout
from engine.config import EngineConfig
from engine.executor import HostMemory
from engine.kv.pool import KVPool

_CLOSE_S = 10.0


class ThreadCopy:
    """Implements engine.executor.BlockCopy."""

    def __init__(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Addresses of blocks, pair by pair."""
        self._targets = targets
        self._sources = sources
        self._duration_s: float | None = None

    def run(self, block_bytes: int) -> None:
        """Copy everything; memmove lets other threads run meanwhile."""
        began_at = time.perf_counter()
        for target, source in zip(self._targets, self._sources, strict=True):
            ctypes.memmove(target, source, block_bytes)
        self._duration_s = time.perf_counter() - began_at

    def poll(self) -> float | None:
        """See BlockCopy."""
        return self._duration_s


class ThreadedHostMemory:
    """Implements engine.executor.HostMemory by one thread that copies in the order it was asked."""

    def __init__(self, pool: KVPool, num_blocks: int) -> None:
        """Reserve `num_blocks` blocks beside `pool`, whose layout they have."""
        self._pool = pool
        self._host = KVPool(pool.layout, num_blocks, torch.device("cpu"))
        self._copies: queue.SimpleQueue[ThreadCopy | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="block copies", daemon=True)
        self._thread.start()

    @property
    def num_blocks(self) -> int:
        """See HostMemory."""
        return self._host.num_blocks

    @property
    def block_bytes(self) -> int:
        """See HostMemory."""
        return self._host.layout.block_bytes

    def save(self, block_ids: Sequence[int], host_ids: Sequence[int]) -> ThreadCopy:
        """See HostMemory."""
        return self._start(_addresses(self._host, host_ids), _addresses(self._pool, block_ids))

    def load(self, host_ids: Sequence[int], block_ids: Sequence[int]) -> ThreadCopy:
        """See HostMemory."""
        return self._start(_addresses(self._pool, block_ids), _addresses(self._host, host_ids))

    def close(self) -> None:
        """Let what is under way end. Idempotent."""
        self._copies.put(None)  # further ones are never looked at
        self._thread.join(_CLOSE_S)

    def _start(self, targets: Sequence[int], sources: Sequence[int]) -> ThreadCopy:
        copy = ThreadCopy(targets, sources)
        self._copies.put(copy)
        return copy

    def _work(self) -> None:
        while (copy := self._copies.get()) is not None:
            copy.run(self.block_bytes)


def check_host_settings(config: EngineConfig) -> None:
    """Refuse settings that don't go together.

    Raises:
        ConfigError: says which.
    """
    if config.host_kv_bytes and not config.prefix_caching:
        raise ConfigError(
            "host_kv_memory keeps what the prefix cache evicts: turn prefix_caching on, or leave "
            "host_kv_memory out."
        )


def make_host_memory(config: EngineConfig, pool: KVPool) -> HostMemory | None:
    """The memory that the settings ask for below `pool`; None if they ask for none.

    Raises:
        ConfigError: their size doesn't fit the layout or the machine.
    """
    num_blocks = num_host_blocks(config, pool.layout)
    if num_blocks == 0:
        return None
    if pool.device_id is None:
        return ThreadedHostMemory(pool, num_blocks)
    from engine.cuda.host_memory import StreamedHostMemory

    return StreamedHostMemory(pool, num_blocks)


def num_host_blocks(config: EngineConfig, layout: KvLayout) -> int:
    """Blocks of host memory, on each rank, that the settings ask for; 0: no tier below the pool.

    Args:
        config: of the engine; the ranks of a host share what it says.
        layout: of a rank's blocks.

    Raises:
        ConfigError: the size doesn't fit the layout or the machine.
    """
    if config.host_kv_bytes == 0:
        return 0
    size = config.host_kv_bytes // config.ranks_per_node
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not layout.block_bytes <= size <= installed:
        raise ConfigError(
            f"host_kv_memory is {size} bytes a rank; give at least the {layout.block_bytes} of one "
            f"KV block and less than the {installed} that this machine has, or 0 for none."
        )
    return size // layout.block_bytes


def _addresses(pool: KVPool, block_ids: Sequence[int]) -> list[int]:
    base, size = pool.base_address, pool.layout.block_bytes
    return [base + block_id * size for block_id in block_ids]
