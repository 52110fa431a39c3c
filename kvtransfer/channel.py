"""What `peer_reads` asks of a way to one peer's pool; each transport has one of its own."""

from collections.abc import Callable, Sequence
from typing import Protocol


class Copies(Protocol):
    """A READ that goes on by itself."""

    def duration_s(self) -> float | None:
        """What it took, in seconds; None while it is under way. Doesn't wait.

        Raises:
            TransferError: it can't go on; the channel is of no more use.
        """
        ...

    def free(self) -> None:
        """Forget it. Once, after it has ended or its channel was closed."""
        ...


Start = Callable[[Sequence[int], Sequence[int]], Copies]
"""Starts to copy peer's blocks to own ones; raises TransferError like `Channel.read`."""


class Channel(Protocol):
    """A way to one peer's pool. Used by one thread, but for `interrupt` and what `open` returns."""

    def open(self) -> Start | None:
        """Connect, waiting at most a few seconds.

        Returns:
            What starts a READ without waiting, for the engine's thread to call until `close`; then
            `read` is never called. None if there is no such thing.
        """
        ...

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> None:
        """Copy blocks; returns when every byte is here.

        Raises:
            TransferError or OSError: it can't go on; the channel is of no more use.
        """
        ...

    def interrupt(self) -> None:
        """Make `open` and `read` raise soon. From another thread; repeated until they did."""
        ...

    def close(self) -> None:
        """Cut the connection. On return nothing that was asked for can land any more."""
        ...
