"""Stamps: what a probe's first block holds, so that who reads it can tell that it really came.

Called through `WorkerTransport` by the engine loop, and on other ranks by `rank_service.py`; the
blocks are held for a probe, so that no step and no READ touches them meanwhile. Invariant: a stamp
follows from its name and the heads that it lies in alone, so workers of unequal numbers of ranks
agree on it, and no two probes have the same.
"""

from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from core.errors import TransferError
from core.kv_layout import KvLayout
from kvtransfer.cuda_driver import CudaDriver
from kvtransfer.head_slices import rank_heads
from kvtransfer.pool_memory import pool_view
from kvtransfer.transport import BlockPool

_FINITE = 0x3F
"""Bits that a byte of a stamp may have: no element of any float dtype is then NaN or infinite,
which a pool must never hold where attention may look at padding."""


class Stamps(Protocol):
    """Stamps in one rank's pool. Both raise TransferError if the pool can't be got at."""

    def write(self, block_id: int, name: str) -> None:
        """Put the stamp of `name` into a block."""
        ...

    def holds(self, block_id: int, name: str) -> bool:
        """True if a block holds the stamp of `name`, every byte of it."""
        ...


class PoolStamps:
    """Implements Stamps for a pool in host memory or on a GPU."""

    def __init__(self, pool: BlockPool, layout: KvLayout, *, rank: int = 0, size: int = 1) -> None:
        """Take a pool.

        Args:
            pool: of this rank.
            layout: of the whole model's blocks.
            rank: which one this is.
            size: how many ranks the worker has.
        """
        self._pool = pool
        self._layout = layout
        self._rank = rank
        self._size = size

    def write(self, block_id: int, name: str) -> None:
        """See Stamps."""
        stamp = self._stamp(name)
        start = block_id * len(stamp)
        if self._pool.device_id is None:
            pool_view(self._pool)[start : start + len(stamp)] = stamp.data
        else:
            driver = CudaDriver()
            driver.use(self._pool.device_id)
            driver.upload(self._pool.base_address + start, stamp)

    def holds(self, block_id: int, name: str) -> bool:
        """See Stamps."""
        stamp = self._stamp(name)
        start = block_id * len(stamp)
        if self._pool.device_id is None:
            view = pool_view(self._pool)[start : start + len(stamp)]
            return bool(np.array_equal(np.frombuffer(view, dtype=np.uint8), stamp))
        found = np.empty_like(stamp)
        driver = CudaDriver()
        driver.use(self._pool.device_id)
        driver.download(found, self._pool.base_address + start)
        return bool(np.array_equal(found, stamp))

    def _stamp(self, name: str) -> NDArray[np.uint8]:
        """This rank's part, [bytes of its block]."""
        layout, block_bytes = self._layout, self._pool.layout.block_bytes
        parts = layout.num_layers * 2
        heads = rank_heads(layout.num_kv_heads, self._size, self._rank)
        head_bytes, rest = divmod(block_bytes, parts * len(heads))
        if rest:
            raise TransferError(f"A block of {block_bytes} bytes has no whole heads to stamp.")
        stamp = np.empty((parts, len(heads), head_bytes), dtype=np.uint8)
        for index, head in enumerate(heads):
            source = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{name}/{head}".encode()))
            drawn = np.frombuffer(source.bytes(parts * head_bytes), dtype=np.uint8)
            stamp[:, index] = (drawn & _FINITE).reshape(parts, head_bytes)
        return stamp.reshape(-1)
