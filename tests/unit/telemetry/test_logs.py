import io
import json
import logging
from collections.abc import Iterator

import pytest

from telemetry.logs import LogFormat, request_context, setup

log = logging.getLogger("test.logs")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before, level
    logging.captureWarnings(False)


def started(format: LogFormat, *secrets: str) -> io.StringIO:
    stream = io.StringIO()
    setup("info", format, "decode-0", secrets=secrets, stream=stream)
    return stream


def test_json_line_holds_time_level_process_message_and_extras() -> None:
    stream = started("json")
    log.warning("took %d ms\nand more", 7, extra={"blocks": 3})
    entry = json.loads(stream.getvalue())
    assert entry["level"] == "warning"
    assert entry["process"] == "decode-0"
    assert entry["message"] == "took 7 ms\nand more"
    assert entry["blocks"] == 3
    assert entry["ts"].endswith("+00:00")


def test_console_line_holds_level_process_message_and_extras() -> None:
    stream = started("console")
    log.info("ready", extra={"port": 9})
    assert stream.getvalue().endswith("INFO    decode-0: ready port=9\n")


@pytest.mark.parametrize("format", ["json", "console"])
def test_request_id_is_on_lines_inside_the_context_only(format: LogFormat) -> None:
    stream = started(format)
    with request_context("req-1"):
        log.info("inside")
    log.info("outside")
    inside, outside = stream.getvalue().splitlines()
    assert "req-1" in inside
    assert "req-1" not in outside


@pytest.mark.parametrize("format", ["json", "console"])
def test_secrets_are_masked_in_messages_extras_and_tracebacks(format: LogFormat) -> None:
    stream = started(format, "s3cret", "")
    try:
        raise RuntimeError("token s3cret")
    except RuntimeError:
        log.exception("with %s", "s3cret", extra={"given": "s3cret"})
    assert "s3cret" not in stream.getvalue()
    assert "RuntimeError: token ***" in stream.getvalue()


def test_level_is_respected_and_setup_replaces_what_was_there() -> None:
    first = started("console")
    second = started("console")
    log.debug("too fine")
    log.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1
