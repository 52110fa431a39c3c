"""Host memory of several ranks: each copies its own heads of every block, to a place of its own.

On rank 0 `RankedHostMemory` tells the others what to copy, and then that a copy has ended, over the
pipes that carry plans; there `RankCopies` obeys. Invariant: a rank that reads any frame has ended
every copy of which rank 0 has seen the end. So what rank 0 plans after that is right everywhere.
"""

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from core.errors import DiptychError
from engine.executor import BlockCopy, HostMemory
from engine.parallel.pipe import Frame

_COPY = struct.Struct("<QBI")
"""Number of the copy, 1 if it goes out of the pool, blocks. Then ids of the pool, ids of host."""
_COPIED = struct.Struct("<Q")
_ID = np.dtype("<i4")
_POLL_S = 0.0002


class SendsFrames(Protocol):
    """What rank 0 has of the others."""

    def send(self, kind: Frame, body: bytes) -> None:
        """To each of them."""
        ...


@dataclass(slots=True)
class _RankedCopy:
    """A BlockCopy that tells the other ranks of its end."""

    local: BlockCopy
    number: int
    ranks: SendsFrames
    duration_s: float | None = field(default=None)

    def poll(self) -> float | None:
        """See BlockCopy."""
        if self.duration_s is None:
            self.duration_s = self.local.poll()
            if self.duration_s is not None:
                self.ranks.send(Frame.COPIED, _COPIED.pack(self.number))
        return self.duration_s


class RankedHostMemory:
    """Implements HostMemory on rank 0."""

    def __init__(self, local: HostMemory, ranks: SendsFrames, size: int) -> None:
        """Args: local is rank 0's own; size counts all ranks."""
        self._local = local
        self._ranks = ranks
        self._size = size
        self._count = 0

    @property
    def num_blocks(self) -> int:
        """See HostMemory. Every rank has as many."""
        return self._local.num_blocks

    @property
    def block_bytes(self) -> int:
        """See HostMemory. Of all ranks together."""
        return self._local.block_bytes * self._size

    def save(self, block_ids: Sequence[int], host_ids: Sequence[int]) -> BlockCopy:
        """See HostMemory."""
        self._tell(block_ids, host_ids, out=True)
        return _RankedCopy(self._local.save(block_ids, host_ids), self._count, self._ranks)

    def load(self, host_ids: Sequence[int], block_ids: Sequence[int]) -> BlockCopy:
        """See HostMemory."""
        self._tell(block_ids, host_ids, out=False)
        return _RankedCopy(self._local.load(host_ids, block_ids), self._count, self._ranks)

    def close(self) -> None:
        """See HostMemory. The other ranks close theirs when they end."""
        self._local.close()

    def _tell(self, block_ids: Sequence[int], host_ids: Sequence[int], *, out: bool) -> None:
        self._count += 1
        head = _COPY.pack(self._count, out, len(block_ids))
        self._ranks.send(Frame.COPY, head + np.array([*block_ids, *host_ids], _ID).tobytes())


class RankCopies:
    """The copies of a rank that was told to make them."""

    def __init__(self, memory: HostMemory | None, timeout_s: float) -> None:
        """Args: timeout_s is how long a copy may take beyond rank 0's."""
        self._memory = memory
        self._timeout_s = timeout_s
        self._copies: dict[int, BlockCopy] = {}

    def obey(self, kind: Frame, body: bytes) -> None:
        """Start the copy of a COPY frame, or wait for the one of a COPIED frame.

        Raises:
            DiptychError: it does not end.
        """
        if kind is Frame.COPIED:
            self._finish(*_COPIED.unpack(body))
            return
        assert self._memory is not None, "rank 0 has host memory, and this rank has none"
        number, out, count = _COPY.unpack_from(body)
        ids = np.frombuffer(body, _ID, 2 * count, _COPY.size).tolist()
        block_ids, host_ids = ids[:count], ids[count:]
        if out:
            self._copies[number] = self._memory.save(block_ids, host_ids)
        else:
            self._copies[number] = self._memory.load(host_ids, block_ids)

    def _finish(self, number: int) -> None:
        copy = self._copies.pop(number)
        deadline = time.monotonic() + self._timeout_s
        while copy.poll() is None:
            if time.monotonic() > deadline:
                raise DiptychError(f"A copy of KV blocks took over {self._timeout_s:.0f} s.")
            time.sleep(_POLL_S)
