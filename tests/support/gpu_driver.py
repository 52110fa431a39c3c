"""What stands in for a GPU where there is none: memory that processes map, copied by the CPU.

Copies really cross processes; only the one who copies is another. Everything above the CUDA driver
runs as it does on a GPU.
"""

import ctypes
import mmap
import os
import struct

import numpy as np
from numpy.typing import NDArray

from core.errors import TransferError
from kvtransfer.cuda_driver import HANDLE_BYTES, CudaDriver


class SharedMemory:
    """Zeroed memory that another process of the same user can map by its handle."""

    def __init__(self, num_bytes: int) -> None:
        self._fd = os.memfd_create("pool", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, num_bytes)
        self._map = mmap.mmap(self._fd, num_bytes)
        self.words: NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        self.handle = f"/proc/{os.getpid()}/fd/{self._fd}".encode().ljust(HANDLE_BYTES, b"\0")

    def __del__(self) -> None:
        os.close(self._fd)


class SharedMemoryDriver(CudaDriver):
    """Implements CudaDriver. A copy has ended when it was queued."""

    def __init__(self, own: SharedMemory) -> None:
        self._own = own
        self._mapped: dict[int, NDArray[np.uint8]] = {}
        self._streams = 0
        self.events = 0
        """Made and not freed yet."""
        self.launches = 0

    def use(self, device_id: int) -> None:
        pass

    def export(self, device_id: int, address: int) -> tuple[bytes, int]:
        return self._own.handle, address - self._own.words.ctypes.data

    def open_handle(self, handle: bytes) -> int:
        try:
            with open(handle.rstrip(b"\0"), "r+b") as file:
                content = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        except OSError as error:
            raise TransferError(f"The handle can't be opened: {error}") from error
        self._mapped[content.ctypes.data] = content
        return content.ctypes.data

    def close_handle(self, address: int) -> None:
        del self._mapped[address]

    def new_stream(self) -> int:
        self._streams += 1
        return self._streams

    def free_stream(self, stream: int) -> None:
        pass

    def new_event(self) -> int:
        self.events += 1
        return self.events

    def free_event(self, event: int) -> None:
        self.events -= 1

    def mark(self, event: int, stream: int) -> None:
        pass

    def follow(self, stream: int, event: int) -> None:
        pass

    def reached(self, event: int) -> bool:
        return True

    def seconds_between(self, begin: int, end: int) -> float:
        return 1e-6

    def copy(
        self,
        targets: NDArray[np.uint64],
        sources: NDArray[np.uint64],
        num_bytes: int,
        stream: int,
    ) -> None:
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            ctypes.memmove(target, source, num_bytes)

    def load_kernel(self, code: bytes, name: str) -> int:
        assert f".entry {name}(".encode() in code
        return 1

    def launch(
        self,
        kernel: int,
        *,
        programs: int,
        threads: tuple[int, int],
        argument: bytes,
        stream: int,
    ) -> None:
        """What kvtransfer/gpu_rows.ptx does, of which this is all that there is."""
        self.launches += 1
        source_pitch, target_pitch, rows, width, blocks = struct.unpack_from("<QQIII", argument)
        assert programs > 0 and 0 < threads[0] * threads[1] <= 1024
        for block in range(blocks):
            source, target = struct.unpack_from("<QQ", argument, 32 + 16 * block)
            for row in range(rows):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, 16 * width)
