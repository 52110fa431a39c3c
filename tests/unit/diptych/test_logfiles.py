import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from core.errors import ConfigError
from diptych.cluster.console import Screen
from diptych.cluster.logfiles import ChildLog, LogLine, make_log_folder, parse_line
from telemetry.logs import JsonFormatter


def json_line(level: int, message: str, **extra: object) -> str:
    record = logging.makeLogRecord(
        {"levelno": level, "levelname": logging.getLevelName(level), "msg": message, **extra}
    )
    return JsonFormatter("decode-0", ()).format(record)


def test_line_of_a_child_is_read_as_the_formatter_writes_it() -> None:
    level, text, _ = parse_line(json_line(logging.WARNING, "lost 100%s", worker="prefill-0"))
    assert level == logging.WARNING
    assert text.endswith("WARNING lost 100%s worker=prefill-0")


def test_traceback_of_a_child_is_kept() -> None:
    entry = json.loads(json_line(logging.ERROR, "broke")) | {"exception": "Traceback\n  boom"}
    assert parse_line(json.dumps(entry)).text.endswith("broke\nTraceback\n  boom")


@pytest.mark.parametrize("raw", ["", "plain text", "3", "[1]", "{}", '{"level": "odd"}', "{"])
def test_other_text_is_left_as_it_is(raw: str) -> None:
    assert parse_line(raw) == LogLine(0, raw)


def test_log_keeps_a_file_the_last_lines_and_shows_each(tmp_path: Path) -> None:
    shown: list[tuple[str, int]] = []
    log = ChildLog("router", tmp_path, lambda name, line: shown.append((name, line.level)))
    for index in range(100):
        log.write(f"line {index}")
    log.write(json_line(logging.ERROR, "last"))
    log.close()
    lines = (tmp_path / "router.log").read_text().splitlines()
    assert lines[0] == "line 0"
    assert lines[-1].endswith("last")
    assert log.tail.splitlines()[-2:] == ["line 99", lines[-1]]
    assert "line 0" not in log.tail.splitlines()
    assert shown[-1] == ("router", logging.ERROR)


def test_old_log_folders_are_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    logs = tmp_path / "diptych" / "logs"
    for index in range(30):
        (logs / f"2020{index:04}-000000-1").mkdir(parents=True)
    folder = make_log_folder(None)
    left = sorted(path.name for path in logs.iterdir())
    assert folder.name in left
    assert len(left) == 10
    assert left[0] == "20200021-000000-1"


def test_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--log-dir"):
        make_log_folder(str(tmp_path / "file" / "logs"))


def test_a_stage_of_a_start_is_told_from_other_lines() -> None:
    entry = {"ts": "2026-11-22T10:00:00+00:00", "level": "info", "message": "engine start"}
    assert parse_line(json.dumps(entry)).stage == ""
    assert parse_line(json.dumps({**entry, "stage": "loading the weights"})).stage == (
        "loading the weights"
    )


def test_stages_are_shown_where_other_lines_of_their_level_are_not() -> None:
    output = io.StringIO()
    screen = Screen(Console(file=output), console_level=logging.WARNING)
    screen.child_line("decode-0", LogLine(logging.INFO, "chatter"))
    screen.child_line("decode-0", LogLine(logging.INFO, "x", stage="loading the weights"))
    assert output.getvalue() == "  decode-0: loading the weights\n"
