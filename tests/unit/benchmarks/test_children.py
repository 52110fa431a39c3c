"""Commands under a time limit, and what other engines print."""

import json
import os
import sys
import time
from pathlib import Path

from benchmarks.children import figures, run

STEP = {"peer": "vllm 0.26.0", "bench": "decode_step", "batch": 64, "seconds": 0.0187}


def test_output_of_a_command_that_ends() -> None:
    ended = run([sys.executable, "-Sc", "print('out')"], timeout_s=30)
    assert (ended.code, ended.output, ended.trouble) == (0, "out\n", "")


def test_a_failure_is_told_with_its_errors() -> None:
    ended = run("echo before; echo why >&2; exit 3", timeout_s=30, merged=True)
    assert (ended.output, ended.trouble) == ("before\nwhy\n", "ended with code 3")


def test_time_limit_ends_all_and_keeps_what_was_printed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    begun = time.monotonic()
    ended = run(f"echo early; sleep 300 & echo $! > {file}; wait", timeout_s=0.5)
    assert time.monotonic() - begun < 10
    assert ended.timed_out
    assert ended.output == "early\n"
    assert "time limit" in ended.trouble
    assert_gone(int(file.read_text()))


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    ended = run(f"sleep 300 & echo $! > {file}", timeout_s=30)
    assert (ended.code, ended.timed_out) == (0, False)
    assert_gone(int(file.read_text()))


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still runs")


def test_figures_among_other_output() -> None:
    offline = {"bench": "offline", "seconds": 7, "output_tokens": 9, "tokens_per_s": 9 / 7}
    prefill = {"bench": "prefill", "peer": "x", "tokens": 8192, "seconds": 0.2, "more": [1]}
    lines = ["INFO loading", json.dumps(STEP), "  " + json.dumps(offline), json.dumps(prefill)]
    assert figures("\n".join(lines)) == [STEP, {"peer": "peer", **offline}, prefill]


def test_lines_that_are_no_figures_are_passed_over() -> None:
    bad = [
        "{",
        "[1, 2]",
        "{}",
        '"bench"',
        '{"bench": 3, "seconds": 1}',
        json.dumps({**STEP, "bench": "unknown"}),
        json.dumps({**STEP, "seconds": "0.1"}),
        json.dumps({**STEP, "seconds": 0}),
        json.dumps({**STEP, "seconds": None}),
        json.dumps({**STEP, "seconds": True}),
        json.dumps({**STEP, "seconds": float("nan")}),
        json.dumps({**STEP, "seconds": float("inf")}),
        json.dumps({**STEP, "more": 0})[:-2] + "[" * 100_000 + "}",
        json.dumps({"bench": "decode_step", "seconds": 1}),
        json.dumps({"bench": "offline", "seconds": 1, "output_tokens": 3}),
        json.dumps(STEP)[:-1],
        "{" * 100_000,
    ]
    assert figures("\n".join(bad)) == []
