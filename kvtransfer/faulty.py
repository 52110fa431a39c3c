"""READs that fail on purpose: a WorkerTransport around another. Only there while faults are on.

Invariant: what `WorkerTransport` promises still holds. A READ is seen FAILED only when nothing can
land any more, and what a short or corrupt one left behind lies in blocks that are then given back.
"""

import ctypes
from collections.abc import Sequence

from core.clock import Clock
from core.kv_layout import KvLayout
from kvtransfer.transport import BlockPool, Read, ReadState
from kvtransfer.worker_transport import WorkerTransport
from telemetry.faults import Effect, Faults, Point

_RUBBISH = 0xA5


class FaultyTransport:
    """Implements WorkerTransport. One thread calls it."""

    def __init__(
        self, inner: WorkerTransport, pool: BlockPool, faults: Faults, clock: Clock
    ) -> None:
        """Around `inner`, which reads into `pool`."""
        self._inner = inner
        self._pool = pool
        self._faults = faults
        self._clock = clock

    @property
    def name(self) -> str:
        """See WorkerTransport."""
        return self._inner.name

    @property
    def rank_metadata(self) -> tuple[bytes, ...]:
        """See WorkerTransport."""
        return self._inner.rank_metadata

    def connect(self, peer_id: str, layout: KvLayout, rank_metadata: Sequence[bytes]) -> None:
        """See WorkerTransport."""
        self._inner.connect(peer_id, layout, rank_metadata)

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> Read:
        """See WorkerTransport; what the fault point says becomes of it."""
        rule = self._faults.at(Point.KV_READ)
        if rule is None:
            return self._inner.read(peer_id, pairs)
        if rule.effect is Effect.DELAY:
            return _LateRead(self._inner.read(peer_id, pairs), rule.seconds, self._clock)
        arriving = {Effect.FAIL: 0, Effect.SHORT: len(pairs) // 2}.get(rule.effect, len(pairs))
        part = self._inner.read(peer_id, pairs[:arriving]) if arriving else None
        spoilt = [own for _, own in pairs] if rule.effect is Effect.CORRUPT else []
        return _SpoiltRead(
            self, part, peer_id, spoilt, f"injected fault {rule.point}:{rule.effect}"
        )

    def stamp(self, block_id: int, name: str) -> None:
        """See WorkerTransport."""
        self._inner.stamp(block_id, name)

    def bears(self, block_id: int, name: str) -> bool:
        """See WorkerTransport; of a probe that the fault point spoils it is not true."""
        rule = self._faults.at(Point.KV_STAMP)
        return rule is None and self._inner.bears(block_id, name)

    def spoil(self, peer_id: str, block_ids: Sequence[int]) -> None:
        """Drop a peer, so that nothing lands any more, and put rubbish into own blocks."""
        self._inner.disconnect(peer_id)
        if not block_ids or self._pool.device_id is not None:
            return
        num_bytes = self._pool.layout.block_bytes
        for block_id in block_ids:
            ctypes.memset(self._pool.base_address + block_id * num_bytes, _RUBBISH, num_bytes)

    def disconnect(self, peer_id: str) -> None:
        """See WorkerTransport."""
        self._inner.disconnect(peer_id)

    def check(self) -> None:
        """See WorkerTransport."""
        self._inner.check()

    def close(self) -> None:
        """See WorkerTransport."""
        self._inner.close()


class _LateRead:
    """A READ that is said to have ended some time after it did."""

    def __init__(self, inner: Read, delay_s: float, clock: Clock) -> None:
        self._inner = inner
        self._delay_s = delay_s
        self._clock = clock
        self._ended_at: float | None = None

    def poll(self) -> ReadState:
        state = self._inner.poll()
        if state is not ReadState.DONE:
            return state
        if self._ended_at is None:
            self._ended_at = self._clock()
        late = self._clock() >= self._ended_at + self._delay_s
        return state if late else ReadState.PENDING

    @property
    def error(self) -> str:
        return self._inner.error

    @property
    def duration_s(self) -> float:
        return self._inner.duration_s + self._delay_s


class _SpoiltRead:
    """A READ that ends without its blocks."""

    def __init__(
        self,
        transport: FaultyTransport,
        part: Read | None,
        peer_id: str,
        spoilt: Sequence[int],
        error: str,
    ) -> None:
        self._transport = transport
        self._part = part
        self._peer_id = peer_id
        self._spoilt = spoilt
        self.error = error
        self.duration_s = 0.0
        self._over = False

    def poll(self) -> ReadState:
        if self._over:
            return ReadState.FAILED
        if self._part is not None and self._part.poll() is ReadState.PENDING:
            return ReadState.PENDING
        self._over = True
        self._transport.spoil(self._peer_id, self._spoilt)
        return ReadState.FAILED
