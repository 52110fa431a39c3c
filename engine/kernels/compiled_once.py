"""Lets one process compile while the others that want the same wait for it.

`engine.kernels.decode` is the only caller: the workers of a machine start at about the same time,
and compiling takes each of them ten seconds of a processor. Invariant: nobody waits longer than
compiling takes; who has waited in vain compiles for itself.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.clock import Clock, monotonic

LOCK = "lock"
_POLL_S = 0.1


@contextmanager
def compiled_once(
    folder: Path,
    what: str,
    progress: Callable[[str], None],
    *,
    timeout_s: float = 60.0,
    clock: Clock = monotonic,
) -> Iterator[None]:
    """Compile into `folder`, or load what is there, within the block.

    Args:
        folder: the compiler's cache, which can be written.
        what: is compiled, for `progress`.
        progress: told when that takes long.
        timeout_s: how long to wait for another process that compiles.
        clock: where time comes from.
    """
    done = folder / "compiled"
    if done.exists():
        yield
        return
    with (folder / LOCK).open("w") as file:
        told, give_up_at = "", clock() + timeout_s
        while not (mine := _taken(file.fileno())) and clock() < give_up_at:
            if not told:
                told = f"waiting for another process that compiles {what}"
                progress(told)
            time.sleep(_POLL_S)
        if not mine or not done.exists():
            progress(f"compiling {what} (once)")
        yield
        done.touch()


def _taken(fd: int) -> bool:
    """Take the lock, which its file's end gives back, unless another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: each process compiles for itself
    return True
