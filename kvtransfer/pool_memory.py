"""A block pool as the bytes that a transport copies. Used by the transports of this package."""

import ctypes
from collections.abc import Iterable, Sequence

from core.errors import TransferError
from kvtransfer.transport import BlockPool


def pool_view(pool: BlockPool) -> memoryview:
    """The whole pool as writable bytes, [num_blocks * block_bytes]. Host memory only.

    The view keeps `pool` alive, and with it memory that the pool owns.
    """
    num_bytes = pool.num_blocks * pool.layout.block_bytes
    memory = (ctypes.c_char * num_bytes).from_address(pool.base_address)
    memory.owner = pool  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def check_ids(ids: Iterable[int], num_blocks: int, whose: str) -> None:
    """Raise TransferError unless every id names a block of a pool of `num_blocks`."""
    for block in ids:
        if not 0 <= block < num_blocks:
            raise TransferError(f"Block {block} is outside {whose} pool of {num_blocks} blocks.")


def check_distinct(ids: Sequence[int]) -> None:
    """Raise TransferError if an own block would be filled twice by one READ."""
    if len(set(ids)) != len(ids):
        raise TransferError("One READ names the same own block twice.")


def block_slices(view: memoryview, ids: Sequence[int], block_bytes: int) -> list[memoryview]:
    """Bytes of the blocks in the given order, neighbours joined into one slice."""
    slices = []
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            first = ids[start] * block_bytes
            slices.append(view[first : first + (i - start) * block_bytes])
            start = i
    return slices
