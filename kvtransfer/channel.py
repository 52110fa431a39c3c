"""What `peer_reads` asks of a way to one peer's pool; each transport has one of its own."""

from collections.abc import Sequence
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


class Channel(Protocol):
    """A way to one peer's pool. Used by one thread, but for `interrupt` and what `open` tells."""

    def open(self) -> bool:
        """Connect, waiting at most a few seconds.

        Returns:
            Whether READs go on by themselves. Then `read` doesn't wait, and until `close` the
            engine's thread calls it.
        """
        ...

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> Copies | None:
        """Copy blocks.

        Returns:
            None when every byte is here; or, where READs go on by themselves, the one that began.

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
