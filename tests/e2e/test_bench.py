"""`diptych bench` on the whole system: what it counts is what was asked for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster


def test_streams_are_as_long_as_was_asked_and_timelines_account_for_them(
    plain: Cluster, tmp_path: Path
) -> None:
    kept = tmp_path / "run.json"
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 100 * n, "input_length": 600 + n, "output_length": 5, "hash_ids": [1, 50 + n]}
        for n in range(4)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def bench(*argv: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "diptych", "bench", "--url", plain.url, "--strict"]
        done = subprocess.run(
            [*command, "--clients=2", f"--json={kept}", *argv],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(kept.read_text())
        return found | {"shown": done.stdout}

    drawn = bench(
        *("--rate=20", "--requests=10", "--prompt-tokens=16..48", "--output-tokens=4..12"),
        *("--timelines=3", "--seed=5"),
    )
    requests = drawn["requests"]
    assert isinstance(requests, list) and len(requests) == 10
    replay = bench("--trace", str(trace), "--faster=2", "--warmup=0")
    plain.wait_balanced()

    assert drawn["endpoint"]["software"] == "diptych"
    assert all(16 <= each["prompt_tokens"] <= 48 for each in requests)
    assert all(4 <= each["output_tokens"] <= 12 for each in requests)
    assert len({each["output_tokens"] for each in requests}) > 2
    stages = drawn["stages_s"]
    assert isinstance(stages, dict) and {"prefill", "decode"} <= set(stages)
    timelines = drawn["timelines"]
    assert isinstance(timelines, list) and len(timelines) == 3
    assert sum(stages.values()) == pytest.approx(
        sum(each["end_to_end_s"] for each in timelines) / 3
    )
    assert "where time went (3 timelines)" in str(drawn["shown"])

    traced = replay["requests"]
    assert isinstance(traced, list)
    assert [each["prompt_tokens"] for each in traced] == [600, 601, 602, 603]
    assert [each["output_tokens"] for each in traced] == [5] * 4
    assert traced[-1]["due_s"] == pytest.approx(0.15, abs=0.01)
