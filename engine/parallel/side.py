"""What shares the ranks' processes and pipes with the engine, which does not look inside.

A worker that hands KV over needs every rank to read into its own pool while steps run. It brings
the code for that itself (`StartSide`); the engine carries its messages between rank 0 and the rest.
"""

from collections.abc import Callable
from typing import Protocol

from engine.kv.pool import KVPool


class SideChannel(Protocol):
    """A rank's way to rank 0. One thread receives, any may send."""

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The next message, waited for that long or for ever; None: none came."""
        ...

    def interrupt(self) -> None:
        """Let `receive` return None now. From another thread."""
        ...

    def send(self, message: bytes) -> None:
        """To rank 0. Raises PipeClosedError if that is gone; this process then ends."""
        ...

    def fail(self, error: Exception) -> None:
        """End the engine: this rank can't go on."""
        ...


class Side(Protocol):
    """What runs beside a rank's executor."""

    def close(self) -> None:
        """Let go of the pool; the executor is closed next."""
        ...


StartSide = Callable[[int, KVPool, SideChannel], Side]
"""Called with the rank, its pool and its way to rank 0 once the rank's share is built."""
