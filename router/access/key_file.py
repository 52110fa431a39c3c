"""The file of API keys, read again whenever it changes.

Used by router/main.py. A file that can't be read keeps the keys that are in use: better an old key
for a while than nobody let in because of a typing error.
"""

import asyncio
import logging
from pathlib import Path

from core.errors import ConfigError
from core.watched import WatchedFiles
from router.access.door import Door
from router.access.keys import Keys, read_keys

_log = logging.getLogger(__name__)


class KeyFile:
    """A file of keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watched = WatchedFiles([path])

    def read(self) -> Keys:
        """What is in it now.

        Raises:
            ConfigError: it can't be read, or something in it is wrong.
        """
        self._watched.changed()
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(
                f"The file of API keys {self._path} can't be read: {reason}."
            ) from None
        return read_keys(text, str(self._path))

    async def follow(self, door: Door) -> None:
        """Give the door new keys if the file changed since it was read last."""
        if not self._watched.changed():
            return
        try:
            keys = await asyncio.to_thread(self.read)
        except ConfigError as error:
            _log.error("%s The keys that were read before stay in use.", error)
            return
        door.change(keys)
        _log.info("%s was read again: %d API keys", self._path, len(keys.entries))
