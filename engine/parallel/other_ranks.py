"""Messages between who shares the ranks' processes with the engine, on rank 0's side of the pipes.

Made by `children.py`, whose watch fills it. Invariant: once a rank is lost, every call raises why.
"""

import threading
from collections import deque
from typing import NoReturn, Protocol

from core.errors import DiptychError
from engine.executor import ExecutorLostError
from engine.parallel.pipe import Frame, PipeClosedError

_MAX_INBOX = 1 << 16
_VERDICT_S = 1.0
"""How long a failed send waits for the watch, which can say why the rank is gone."""


class Ranks(Protocol):
    """What this needs of the children."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def error(self) -> DiptychError | None:
        """Why they are given up, if they are."""
        ...

    def check(self) -> None:
        """Raise that."""
        ...

    def send(self, kind: Frame, body: bytes) -> None:
        """To each; raises PipeClosedError."""
        ...

    def fail(self, reason: str) -> None:
        """Give them up."""
        ...


class PipesToRanks:
    """Implements OtherRanks."""

    def __init__(self, ranks: Ranks, changed: threading.Condition) -> None:
        """`changed` is notified when the ranks are given up."""
        self._ranks = ranks
        self._changed = changed
        self._inbox: deque[tuple[int, bytes]] = deque()

    @property
    def count(self) -> int:
        """See OtherRanks."""
        return self._ranks.count

    def send(self, message: bytes) -> None:
        """See OtherRanks."""
        self._ranks.check()
        try:
            self._ranks.send(Frame.SIDE, message)
        except PipeClosedError as error:
            with self._changed:
                self._changed.wait_for(lambda: self._ranks.error, _VERDICT_S)
            self.fail(f"A rank takes no message: {error}.")

    def receive(self, timeout_s: float = 0.0) -> list[tuple[int, bytes]]:
        """See OtherRanks."""
        if timeout_s and not self._inbox:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._ranks.error, timeout_s)
        self._ranks.check()
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def fail(self, reason: str) -> NoReturn:
        """See OtherRanks."""
        self._ranks.fail(reason)
        self._ranks.check()
        raise ExecutorLostError(reason)

    def take(self, rank: int, message: bytes) -> None:
        """A message came; called by the watch."""
        if len(self._inbox) >= _MAX_INBOX:
            self._ranks.fail(f"Rank {rank} sends more than anyone asked for.")
            return
        with self._changed:
            self._inbox.append((rank, message))
            self._changed.notify_all()
