"""One peer's pool, read by a Mooncake engine that exists for it alone. Made by `mooncake.py`.

Invariant: an engine is given the pool only when its peer has answered, by the thread that will
destroy it, so that nothing of an engine that was given up can land.
"""

import hmac
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from core.errors import TransferError
from kvtransfer.mooncake_engine import new_engine, post, register, wait
from kvtransfer.mooncake_metadata import NONCE_BYTES, MooncakePool
from kvtransfer.transport import Piece

CONNECT_TIMEOUT_S = 5.0
MAX_CONNECTING = 64
"""Peers that may be slow to answer at once. Mooncake's own call waits up to a minute for a frozen
one, and a thread with it, whoever has lost patience meanwhile."""
_MAX_PIECES_IN_FLIGHT = 128
"""Mooncake refused pieces over TCP when some 2000 were queued for a peer, 512 by report."""
_CONNECT_POLL_S = 0.003
_SOLE_OWNER = 2
"""sys.getrefcount of an object that only the asking function holds."""


def joined_runs(
    own: MooncakePool,
    peer: MooncakePool,
    pieces: Sequence[Piece],
    pairs: Iterable[tuple[int, int]],
) -> Iterator[Piece]:
    """Addresses on both sides and bytes of every run that is adjacent in both pools.

    Args:
        own: pool to fill.
        peer: pool to read.
        pieces: of every block.
        pairs: (peer's block id, own block id) each.
    """
    run: Piece | None = None
    for remote_id, own_id in pairs:
        remote_base = peer.base_address + remote_id * peer.block_bytes
        own_base = own.base_address + own_id * own.block_bytes
        for remote_offset, own_offset, num_bytes in pieces:
            following = Piece(remote_base + remote_offset, own_base + own_offset, num_bytes)
            if run is None:
                run = following
            elif run.joins(following):
                run = run._replace(num_bytes=run.num_bytes + num_bytes)
            else:
                yield run
                run = following
    if run is not None:
        yield run


class _Connecting:
    """An engine on its way to a peer, in a thread that may be left alone with it.

    Mooncake's first call for a peer waits for it, up to a minute, and can't be interrupted. The
    pool is registered only after that, by whoever took the engine, so that an abandoned one has
    nothing of the pool.
    """

    def __init__(self, api: Any, peer: MooncakePool, host: str, slots: threading.Semaphore) -> None:
        if not slots.acquire(blocking=False):
            raise TransferError(
                f"{MAX_CONNECTING} peers have not answered Mooncake yet; retry in a minute."
            )
        self._api = api
        self._peer = peer
        self._host = host
        self._slots = slots
        self._nonce = np.zeros(NONCE_BYTES, dtype=np.uint8)
        self._engine: Any = None
        self._error = ""
        self.abandoned = threading.Event()
        self.finished = threading.Event()
        threading.Thread(target=self._run, name="kv-mooncake-connect", daemon=True).start()

    def take(self) -> Any:
        """The engine, once finished; nobody else holds it then.

        Raises:
            TransferError: there is none.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            raise TransferError(self._error)
        return engine

    def _run(self) -> None:
        try:
            self._engine = self._meet()
        except Exception as error:
            self._error = str(error) or repr(error)
        if self.abandoned.is_set():
            self._engine = None
        self._slots.release()
        self.finished.set()

    def _meet(self) -> Any:
        engine = new_engine(self._api, self._host)
        register(engine, self._nonce.ctypes.data, NONCE_BYTES)
        target = self._peer.target
        address = self._nonce.ctypes.data
        batch = post(engine, target, address, self._peer.nonce_address, NONCE_BYTES)
        wait(engine, batch, target, self.abandoned)
        if not hmac.compare_digest(self._nonce.tobytes(), self._peer.nonce):
            raise TransferError(f"Another process than the one meant answers at {target}.")
        return engine


class MooncakeChannel:
    """An engine that reads one peer's pool; see `channel.Channel`."""

    def __init__(
        self,
        api: Any,
        *,
        own: MooncakePool,
        peer: MooncakePool,
        pieces: Sequence[Piece],
        slots: threading.Semaphore,
    ) -> None:
        """Not connected yet. `slots` bounds the peers that have not answered yet."""
        self._api = api
        self._own = own
        self._peer = peer
        self._pieces = pieces
        self._slots = slots
        self._interrupted = threading.Event()
        self._engine: Any = None

    def open(self) -> bool:
        """Make an engine, let it meet the peer's, and give it the pool to fill."""
        connecting = _Connecting(self._api, self._peer, str(self._own.host), self._slots)
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not connecting.finished.wait(_CONNECT_POLL_S):
            if self._interrupted.is_set() or time.monotonic() > deadline:
                connecting.abandoned.set()
                raise TransferError(f"{self._peer.target} does not answer Mooncake")
        self._engine = connecting.take()
        register(self._engine, self._own.base_address, self._own.num_blocks * self._own.block_bytes)
        return False

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> None:
        """Post pieces, a bounded number at a time, and look at them until all are done."""
        target = self._peer.target
        pending: deque[int] = deque()
        pairs = zip(remote_ids, own_ids, strict=True)
        for run in joined_runs(self._own, self._peer, self._pieces, pairs):
            if len(pending) == _MAX_PIECES_IN_FLIGHT:
                wait(self._engine, pending.popleft(), target, self._interrupted)
            pending.append(
                post(self._engine, target, run.own_offset, run.remote_offset, run.num_bytes)
            )
        while pending:
            wait(self._engine, pending.popleft(), target, self._interrupted)

    def interrupt(self) -> None:
        """Let `open` and `read` raise; what they call does not wait for the peer."""
        self._interrupted.set()

    def close(self) -> None:
        """Destroy the engine, and with it whatever was posted."""
        engine, self._engine = self._engine, None
        assert sys.getrefcount(engine) <= _SOLE_OWNER or engine is None, "its READs would go on"
