"""Rows of bytes of many blocks, copied from GPU to GPU by a kernel (`gpu_rows.ptx`).

What a READ of one rank's heads is made of. The copy engines, which move whole blocks, take a
command for each rectangle and lose microseconds between them: between two H200s the heads of one of
two ranks came at 143 GB/s so, and come at 275 (`benchmarks/gpu_kv_transfer.py`).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from kvtransfer.cuda_driver import CudaDriver
from kvtransfer.transport import Piece

_WORK = struct.Struct("<QQIII4x")
_MOST_BLOCKS = 240
"""Of one launch: parameters of a kernel take 4 KiB."""
UNIT_BYTES = 16
"""What a thread moves at a time, and what all of a row's places are multiples of."""
_UNITS_PER_THREAD = 4
_THREADS = 256
_MOST_PROGRAMS = 32
"""Of one launch; the rest of the GPU is left to what it computes meanwhile."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Pieces of equal size at equal distances, to be copied together."""

    first: Piece
    count: int = 1
    remote_pitch: int = 0
    own_pitch: int = 0


def as_rows(pieces: Sequence[Piece]) -> tuple[Rows, ...]:
    """The same bytes in as few rectangles as neighbours allow.

    A rank's heads lie at the same place for every layer, for K and for V: one rectangle. Those that
    the kernel can't take, because they don't begin and end at whole units, stay single.
    """
    found: list[Rows] = []
    for piece in pieces:
        if found and (joined := _joined(found[-1], piece)) is not None:
            found[-1] = joined
        else:
            found.append(Rows(piece))
    return tuple(found)


def _joined(rows: Rows, piece: Piece) -> Rows | None:
    first, count = rows.first, rows.count
    if piece.num_bytes != first.num_bytes:
        return None
    remote_pitch = rows.remote_pitch or piece.remote_offset - first.remote_offset
    own_pitch = rows.own_pitch or piece.own_offset - first.own_offset
    fits = (
        all(number % UNIT_BYTES == 0 for number in (*first, remote_pitch, own_pitch))
        and min(remote_pitch, own_pitch) >= piece.num_bytes
        and piece.remote_offset == first.remote_offset + count * remote_pitch
        and piece.own_offset == first.own_offset + count * own_pitch
    )
    return Rows(first, count + 1, remote_pitch, own_pitch) if fits else None


class RowKernel:
    """The kernel, loaded for one GPU."""

    def __init__(self, driver: CudaDriver) -> None:
        """Load it for the GPU that is current in this thread."""
        code = files("kvtransfer").joinpath("gpu_rows.ptx").read_bytes()
        self._driver = driver
        self._function = driver.load_kernel(code, "copy_rows")

    def copy(
        self,
        rows: Rows,
        targets: NDArray[np.uint64],
        sources: NDArray[np.uint64],
        stream: int,
    ) -> None:
        """Queue a copy of these rows for each pair of addresses of a first row, [num_blocks].

        All addresses are multiples of `UNIT_BYTES`, and there are `_MOST_BLOCKS` of each at most.
        """
        assert len(targets) <= _MOST_BLOCKS, "one launch takes no more"
        width = rows.first.num_bytes // UNIT_BYTES
        lanes = min(_THREADS, -(-width // _UNITS_PER_THREAD))
        lines = _THREADS // lanes
        work = _WORK.pack(rows.remote_pitch, rows.own_pitch, rows.count, width, len(targets))
        pairs = np.stack([sources, targets], axis=1).tobytes()
        self._driver.launch(
            self._function,
            programs=min(_MOST_PROGRAMS, -(-len(targets) * rows.count // lines)),
            threads=(lanes, lines),
            argument=(work + pairs).ljust(_WORK.size + _MOST_BLOCKS * 16, b"\0"),
            stream=stream,
        )
