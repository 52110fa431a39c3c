"""The user's cache folder, and how a prepared model gets into it: once, whole, or not at all."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.clock import Clock, monotonic
from core.errors import ConfigError
from core.modelfile.resolve import Progress

_POLL_S = 0.2


def models_cache_dir() -> Path:
    """Folder for prepared models: $XDG_CACHE_HOME or ~/.cache, then diptych/models."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return root / "diptych" / "models"


def build_once(
    target: Path,
    build: Callable[[Path], None],
    progress: Progress,
    *,
    timeout_s: float = 900.0,
    clock: Clock = monotonic,
) -> Path:
    """Return `target`, building it first if it isn't there. Safe between processes.

    Args:
        target: folder that either exists whole or not at all.
        build: fills an empty folder next to `target`, which is then renamed.
        progress: told when another process is building.
        timeout_s: how long to wait for that other process.
        clock: where time comes from.

    Raises:
        ConfigError: the cache can't be written, or the other process takes too long.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock_file = target.with_name(target.name + ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"Cache folder {target.parent} can't be written ({error}). "
            "Set XDG_CACHE_HOME to a folder that can."
        ) from error
    with lock_file, _locked(lock_file.fileno(), target, progress, timeout_s, clock):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            build(scratch)
            # mkdtemp makes the folder private; a shared cache must be readable by every worker.
            scratch.chmod(0o755)
            scratch.rename(target)
        except OSError as error:
            raise ConfigError(
                f"Model could not be written under {target.parent} ({error}). "
                "Free some space there, or set XDG_CACHE_HOME."
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _locked(
    fd: int, target: Path, progress: Progress, timeout_s: float, clock: Clock
) -> Iterator[None]:
    deadline = clock() + timeout_s
    told = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if clock() >= deadline:
                raise ConfigError(
                    f"Another process has been preparing {target} for {timeout_s:.0f} s. "
                    "End it and start again."
                ) from None
            if not told:
                progress(f"waiting for another process that prepares {target.name}")
                told = True
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
