"""Workers of several ranks in this process: pools that share a model's heads, and pipes between."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from core.errors import WorkerLostError
from core.kv_layout import KvLayout
from kvtransfer.head_slices import rank_layout
from kvtransfer.rank_service import RankService
from kvtransfer.rank_transport import RankTransport
from kvtransfer.ranked_transport import RankedTransport
from kvtransfer.select import known_transport, open_transport
from kvtransfer.stamps import PoolStamps
from kvtransfer.wire import layout_to_proto
from kvtransfer.worker_transport import WorkerTransport
from rpc.v1.kv_ranks_pb2 import RankOpen

BLOCK_SIZE, HEAD_DIM = 2, 3
HOST, TOKEN = "127.0.0.1", "open sesame"
LET_GO_S = 0.5


def whole_layout(num_layers: int, num_kv_heads: int, dtype: str = "float16") -> KvLayout:
    """Of blocks with the heads of all ranks."""
    elements = num_layers * 2 * num_kv_heads * BLOCK_SIZE * HEAD_DIM
    return KvLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        block_bytes=elements * np.dtype(dtype).itemsize,
    )


def fits(num_kv_heads: int, size: int) -> bool:
    """True if so many ranks can share the heads."""
    return num_kv_heads % size == 0 or size % num_kv_heads == 0


def share(blocks: NDArray[Any], size: int, rank: int) -> NDArray[np.uint8]:
    """The bytes that a rank holds of [blocks, layers, 2, heads, block_size, head_dim], by block."""
    heads = blocks.shape[3]
    if size <= heads:
        part = np.split(blocks, size, axis=3)[rank]
    else:
        part = np.repeat(blocks, size // heads, axis=3)[:, :, :, rank : rank + 1]
    return np.ascontiguousarray(part).view(np.uint8).reshape(len(blocks), -1)


class RankPool:
    """One rank's pool in this process's memory; `data` is [num_blocks, block_bytes]."""

    device_id: int | None = None

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.data = np.zeros((num_blocks, layout.block_bytes), np.uint8)
        self.base_address = self.data.ctypes.data


class LocalChannel:
    """A rank's end of a pipe to rank 0."""

    def __init__(self, rank: int, ranks: "LocalRanks") -> None:
        self._rank = rank
        self._ranks = ranks
        self.inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def receive(self, timeout_s: float | None) -> bytes | None:
        try:
            return self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def interrupt(self) -> None:
        self.inbox.put(None)

    def send(self, message: bytes) -> None:
        self._ranks.inbox.put((self._rank, message))

    def fail(self, error: Exception) -> None:
        self._ranks.lost = str(error)


class LocalRanks:
    """Rank 0's end of the pipes. A rank in `frozen` gets nothing."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.channels = {rank: LocalChannel(rank, self) for rank in range(1, count + 1)}
        self.inbox: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self.frozen: set[int] = set()
        self.lost = ""

    def send(self, message: bytes) -> None:
        self._check()
        for rank, channel in self.channels.items():
            if rank not in self.frozen:
                channel.inbox.put(message)

    def receive(self, timeout_s: float = 0.0) -> list[tuple[int, bytes]]:
        self._check()
        try:
            return [self.inbox.get(timeout=timeout_s or None, block=timeout_s > 0)]
        except queue.Empty:
            return []

    def fail(self, reason: str) -> NoReturn:
        self.lost = reason
        self._check()
        raise AssertionError("not reached")

    def _check(self) -> None:
        if self.lost:
            raise WorkerLostError(self.lost)


@dataclass
class RankedWorker:
    """A worker's transport, and what a test looks at."""

    transport: WorkerTransport
    pools: list[RankPool]
    ranks: LocalRanks
    services: list[RankService]


@contextmanager
def ranked_worker(
    layout: KvLayout,
    size: int,
    blocks: NDArray[Any] | int,
    *,
    transport: str = "tcp",
    host_of_others: str | None = None,
) -> Iterator[RankedWorker]:
    """A worker of `size` ranks whose pools hold `blocks`, or so many empty ones."""
    num_blocks = blocks if isinstance(blocks, int) else len(blocks)
    pools = [RankPool(rank_layout(layout, size), num_blocks) for _ in range(size)]
    if not isinstance(blocks, int):
        for rank, pool in enumerate(pools):
            pool.data[:] = share(blocks, size, rank)
    ranks = LocalRanks(size - 1)
    services = [
        RankService(rank, pools[rank], ranks.channels[rank], host=host_of_others)
        for rank in range(1, size)
    ]
    served = open_transport(known_transport(transport), pools[0], host=HOST, token=TOKEN)
    stamps = PoolStamps(pools[0], layout, size=size)
    first = RankTransport(served, layout, stamps, size=size)
    own: WorkerTransport = first
    try:
        if size > 1:
            opening = RankOpen(
                layout=layout_to_proto(layout),
                size=size,
                transport=transport,
                host=HOST,
                token=TOKEN,
            )
            own = RankedTransport(first, ranks, opening, let_go_s=LET_GO_S)
        yield RankedWorker(own, pools, ranks, services)
    finally:
        own.close()
        first.close()
        for service in services:
            service.close()
