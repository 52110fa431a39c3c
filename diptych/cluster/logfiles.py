"""What children print: each line to a file, the last ones kept at hand, the grave ones shown.

Children log JSON, so that a level can be told from a line; anything else (a traceback, a native
library) goes to the file and is shown only when its process fails.
"""

import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NamedTuple

from core.errors import ConfigError

_TAIL_LINES = 30
_MAX_FILE_BYTES = 20 << 20
_KEPT_FOLDERS = 10


class LogLine(NamedTuple):
    """One line of a child."""

    level: int
    """As in `logging`; 0 for what is no log line."""
    text: str
    stage: str = ""
    """What a process that starts is about to do; empty on any other line."""


def parse_line(raw: str) -> LogLine:
    """Read a JSON log line into `time LEVEL message key=value`; other text is left as it is."""
    try:
        entry = json.loads(raw)
        level = logging.getLevelNamesMapping()[entry.pop("level").upper()]
        at = datetime.fromisoformat(entry.pop("ts")).astimezone().strftime("%H:%M:%S.%f")[:-3]
        message = entry.pop("message")
    except (ValueError, KeyError, AttributeError, TypeError):
        return LogLine(0, raw)
    exception = entry.pop("exception", None)
    stage = str(entry.pop("stage", ""))
    fields = "".join(f" {k}={v}" for k, v in entry.items() if k not in ("process", "logger"))
    text = f"{at} {logging.getLevelName(level):<7} {message}{fields}"
    return LogLine(level, f"{text}\n{exception}" if exception else text, stage)


class ChildLog:
    """The output of one child, over all its restarts."""

    def __init__(self, name: str, folder: Path, show: Callable[[str, LogLine], None]) -> None:
        self.path = folder / f"{name}.log"
        self._name = name
        self._show = show
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._file = RotatingFileHandler(self.path, maxBytes=_MAX_FILE_BYTES, backupCount=1)

    def write(self, raw: str) -> None:
        """Take one line as the child printed it."""
        line = parse_line(raw)
        self._tail.append(line.text)
        self._file.emit(logging.makeLogRecord({"msg": line.text}))
        self._show(self._name, line)

    @property
    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._tail)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def make_log_folder(wanted: str | None) -> Path:
    """The folder for this start's files; older ones in the state folder are thinned out.

    Raises:
        ConfigError: it can't be made.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    logs = state / "diptych" / "logs"
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(wanted).expanduser() if wanted else logs / stamp
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wanted is None:
            for old in sorted(entry for entry in logs.iterdir() if entry.is_dir())[:-_KEPT_FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"The folder of log files {folder} can't be made ({error.strerror}). "
            "Choose another one with --log-dir."
        ) from None
    return folder
