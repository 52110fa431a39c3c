"""One peer's KV pool on a GPU of the same host, read by the GPU's own copy engines.

Both pools are mapped in one process (CUDA IPC), so a READ is a batch of copies over NVLink or PCIe
that the peer's process takes no part in: frozen or dead, its memory stays until it is unmapped.
Measured between two H200s with scattered blocks of 2 MiB: 326 GB/s for 4096 tokens of
Llama-3.1-8B, where UCX, which launches a copy for each block, moves 206 and one large copy 384
(`benchmarks/gpu_kv_transfer.py`).
"""

import contextlib
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import TransferError
from kvtransfer.cuda_driver import HANDLE_BYTES, CudaDriver
from kvtransfer.gpu_rows import UNIT_BYTES, RowKernel, Rows, as_rows
from kvtransfer.transport import BlockPool, Piece

_METADATA = struct.Struct(f"<8s16s{HANDLE_BYTES}sQQQI")
_MAGIC = b"DIPTYCHG"
_STREAMS = 4
"""Copies from one stream leave gaps, from two a few; more gain little."""
_BATCH = 64
"""Blocks given to a stream at a time. Queueing one takes 1 to 2 us, so that the first batch is
under way while the last is queued; smaller batches cost more in calls than they begin sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPool:
    """Where a pool lies, for other processes of the host."""

    host: bytes
    """16 bytes that differ between hosts, and between two starts of one."""
    handle: bytes
    """Of the allocation; zeros if it can't be shared."""
    offset: int
    num_blocks: int
    block_bytes: int
    device_id: int

    @classmethod
    def of(cls, pool: BlockPool, driver: CudaDriver) -> "GpuPool":
        """This process's pool, in device memory.

        Raises:
            TransferError: its memory can't be shared, as with torch's expandable segments.
        """
        assert pool.device_id is not None
        handle, offset = driver.export(pool.device_id, pool.base_address)
        return cls(
            host=this_host(),
            handle=handle,
            offset=offset,
            num_blocks=pool.num_blocks,
            block_bytes=pool.layout.block_bytes,
            device_id=pool.device_id,
        )

    def pack(self) -> bytes:
        """For the metadata."""
        numbers = (self.offset, self.num_blocks, self.block_bytes, self.device_id)
        return _METADATA.pack(_MAGIC, self.host, self.handle, *numbers)

    @classmethod
    def unpack(cls, data: bytes) -> tuple["GpuPool", bytes]:
        """What `pack` made, and what follows it; raises TransferError for anything else."""
        try:
            magic, host, handle, offset, blocks, size, device = _METADATA.unpack_from(data)
        except struct.error as error:
            raise TransferError(f"Not the metadata of a pool on a GPU: {error}.") from error
        if magic != _MAGIC or not (blocks and size):
            raise TransferError("Not the metadata of a pool on a GPU that this version knows.")
        pool = cls(
            host=host,
            handle=handle,
            offset=offset,
            num_blocks=blocks,
            block_bytes=size,
            device_id=device,
        )
        return pool, data[_METADATA.size :]


def this_host() -> bytes:
    """16 bytes that every process of this host sees, in whatever container, and no other host."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


class GpuCopies:
    """A READ in the hands of the GPU; see `channel.Copies`."""

    def __init__(self, driver: CudaDriver) -> None:
        """Nothing is queued yet."""
        self._driver = driver
        self.begun = driver.new_event()
        self.ended = driver.new_event()

    def duration_s(self) -> float | None:
        """Ask the GPU, don't wait."""
        if not self._driver.reached(self.ended):
            return None
        return self._driver.seconds_between(self.begun, self.ended)

    def free(self) -> None:
        """Forget the events; what was queued goes on."""
        for event in (self.begun, self.ended):
            with contextlib.suppress(TransferError):
                self._driver.free_event(event)


class GpuCopyChannel:
    """Reads the pool of one process of this host; see `channel.Channel`."""

    def __init__(
        self,
        driver: CudaDriver,
        *,
        own_address: int,
        own: GpuPool,
        peer: GpuPool,
        pieces: Sequence[Piece],
    ) -> None:
        """Nothing is mapped yet. `own_address` is where the own pool lies here."""
        self._driver = driver
        self._own_address = own_address
        self._own = own
        self._peer = peer
        aligned = not (own.block_bytes % UNIT_BYTES or peer.block_bytes % UNIT_BYTES)
        self._rows = as_rows(pieces) if aligned else tuple(map(Rows, pieces))
        self._mapped: int | None = None
        self._streams: list[int] = []
        self._row_kernel: RowKernel | None = None
        self._joins: list[int] = []
        """One event per stream but the first, which waits for the others."""

    def open(self) -> bool:
        """Map the peer's memory; copies then go on by themselves."""
        self._driver.use(self._own.device_id)
        self._mapped = self._driver.open_handle(self._peer.handle)
        self._streams = [self._driver.new_stream() for _ in range(_STREAMS)]
        self._joins = [self._driver.new_event() for _ in self._streams[1:]]
        if any(rows.count > 1 for rows in self._rows):
            self._row_kernel = RowKernel(self._driver)
        return True

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> GpuCopies:
        """Queue the copies, behind those queued before."""
        assert self._mapped is not None, "read before open"
        self._driver.use(self._own.device_id)
        first, *others = self._streams
        sources = _addresses(self._mapped + self._peer.offset, remote_ids, self._peer.block_bytes)
        targets = _addresses(self._own_address, own_ids, self._own.block_bytes)
        copies = GpuCopies(self._driver)
        try:
            self._driver.mark(copies.begun, first)
            for begin, stream in zip(range(0, len(sources), _BATCH), cycle(self._streams)):
                part = slice(begin, begin + _BATCH)
                for rows in self._rows:
                    self._queue(rows, targets[part], sources[part], stream)
            for stream, join in zip(others, self._joins, strict=True):
                self._driver.mark(join, stream)
                self._driver.follow(first, join)
            self._driver.mark(copies.ended, first)
        except TransferError:
            copies.free()
            raise
        return copies

    def interrupt(self) -> None:
        """Nothing to do: copies need nobody's help to end."""

    def close(self) -> None:
        """Wait for copies under way, then unmap."""
        streams, self._streams = self._streams, []
        for stream in streams:
            with contextlib.suppress(TransferError):
                self._driver.free_stream(stream)
        joins, self._joins = self._joins, []
        for join in joins:
            with contextlib.suppress(TransferError):
                self._driver.free_event(join)
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with contextlib.suppress(TransferError):
                self._driver.close_handle(mapped)

    def _queue(
        self, rows: Rows, targets: NDArray[np.uint64], sources: NDArray[np.uint64], stream: int
    ) -> None:
        remote, own, width = rows.first
        targets, sources = targets + np.uint64(own), sources + np.uint64(remote)
        if rows.count == 1:
            self._driver.copy(targets, sources, width, stream)
        else:
            assert self._row_kernel is not None
            self._row_kernel.copy(rows, targets, sources, stream)


def _addresses(base: int, ids: Sequence[int], block_bytes: int) -> NDArray[np.uint64]:
    return np.uint64(base) + np.asarray(ids, dtype=np.uint64) * np.uint64(block_bytes)
