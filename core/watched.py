"""Files that are replaced while a process runs: API keys, certificates.

Kubernetes swaps a symlink above the files of a Secret, certificate tools rename a new file over the
old one, editors write in place; notice comes from looking, since a watch on a file misses the first
two. Whoever reads the files looks once before it does, so that no change is ever missed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

LOOK_EVERY_S = 1.0
"""How long a change may go unnoticed."""


class WatchedFiles:
    """Tells when any of some files is another one, or changed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._seen: list[tuple[int, ...] | None] = []

    def changed(self) -> bool:
        """True if there is something new since the last call; always at the first."""
        now = [_identity(path) for path in self._paths]
        if now == self._seen:
            return False
        self._seen = now
        return True


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
