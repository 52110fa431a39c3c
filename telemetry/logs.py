"""Log lines of a process: console text or one JSON object each, on standard error.

`setup` is called once by each entry point; everything else uses `logging.getLogger(__name__)`.
Inside `request_context` every line bears the request's id. Registered secrets never reach a line.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Put a request's id on every line logged inside, in this task and those it starts."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class _Redacting(logging.Formatter):
    """What both forms share: who logs, fields given as `extra`, and no secrets."""

    def __init__(self, process: str, secrets: Sequence[str]) -> None:
        super().__init__()
        self.process = process
        self._secrets = [secret for secret in secrets if secret]

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """The request id and everything that was given as `extra`."""
        found = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        request_id = getattr(record, "request_id", None) or _request_id.get()
        return {"request_id": request_id, **found} if request_id else found

    def clean(self, line: str) -> str:
        """The line without secrets."""
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line


class ConsoleFormatter(_Redacting):
    """Time, level, process and message, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback under it when there is one."""
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {key}={value}" for key, value in self.fields(record).items())
        line = f"{at} {record.levelname:<7} {self.process}: {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return self.clean(line)


class JsonFormatter(_Redacting):
    """One JSON object per line: ts (UTC), level, process, logger, message, and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        entry: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return self.clean(json.dumps(entry, default=str, ensure_ascii=False))


def setup(
    level: LogLevel,
    format: LogFormat,
    process: str,
    *,
    secrets: Sequence[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send all logging of this process to `stream` (standard error), replacing what was set up.

    Args:
        level: least severe messages to write.
        format: form of a line.
        process: name of this process on each line, such as "prefill-0".
        secrets: texts that are replaced by *** wherever they turn up.
        stream: where to write.
    """
    form = JsonFormatter if format == "json" else ConsoleFormatter
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(form(process, secrets))
    logging.basicConfig(level=level.upper(), handlers=[output], force=True)
    logging.captureWarnings(True)
