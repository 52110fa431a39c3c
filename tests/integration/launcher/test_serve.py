"""`diptych serve` as a user runs it, with a tiny random model: start, trouble, end."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.models import make_checkpoint
from tests.support.process import (
    Process,
    alive,
    command_line,
    descendants,
    free_port,
    running,
    wait_until,
)

START_S = 90.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "diptych", "serve", f"--log-dir={folder}", *options]
    with running(command, name="diptych serve", env={"OMP_NUM_THREADS": "1"}) as launcher:
        everything: list[int] = []
        try:
            yield launcher
            everything = descendants(launcher.pid)
        finally:
            # Each child leads a group of its own, which `running` does not know.
            for pid in everything or descendants(launcher.pid):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def url_of(launcher: Process) -> str:
    line = launcher.wait_for_line("Ready after", START_S)
    found = re.search(r" at (http://\S+)/v1$", line)
    assert found, line
    return found[1]


def complete(url: str) -> httpx.Response:
    body = {"model": "tiny", "prompt": "one two three", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def child(launcher: Process, role: str) -> int:
    (found,) = [p for p in descendants(launcher.pid) if f"{launcher.pid} {role}" in command_line(p)]
    return found


def test_cluster_serves_survives_a_killed_worker_and_ends_whole(
    model: Path, tmp_path: Path
) -> None:
    options = (f"--model={model}", "--served-model-name=tiny", "--port=0", "--num-blocks=64")
    with served(tmp_path, *options, "--kv-transport=tcp") as launcher:
        url = url_of(launcher)
        expected = complete(url)
        assert expected.status_code == 200, expected.text
        names = {f"{name}.log" for name in ("router", "prefill-0", "decode-0")}
        assert {path.name for path in tmp_path.iterdir()} >= names
        assert "curl" in launcher.log
        assert f"{url}/console" in launcher.log

        first = child(launcher, "decode")
        os.kill(first, signal.SIGKILL)
        launcher.wait_for_line("decode-0 was ended by SIGKILL; starting it again", 10)

        def again() -> bool:
            pids = [p for p in descendants(launcher.pid) if p != first]
            started = any(f"{launcher.pid} decode" in command_line(p) for p in pids)
            attached = 'diptych_router_workers{role="decode",state="ready"} 1.0'
            return started and attached in httpx.get(f"{url}/metrics", timeout=5).text

        wait_until(again, START_S, "decode to come back", lambda: launcher.log)
        answer = complete(url)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == expected.json()["choices"]

        everything = descendants(launcher.pid)
        assert len(everything) >= 5
        launcher.signal(signal.SIGINT)
        assert launcher.wait(45) == 0, launcher.log
        assert "Ended." in launcher.log
        left = [command_line(pid) for pid in everything if alive(pid)]
        assert left == []


def test_killed_launcher_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with served(
        tmp_path, f"--model={model}", "--port=0", "--decode=0", "--num-blocks=64"
    ) as launcher:
        url = url_of(launcher)
        everything = descendants(launcher.pid)
        assert len(everything) >= 3
        launcher.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(alive, everything)), 5, "every process to end")
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, timeout=5)


def test_worker_that_cannot_start_ends_the_start_with_its_words(
    model: Path, tmp_path: Path
) -> None:
    too_long = ("--max-model-len=1000000000", "--num-blocks=2")
    with served(tmp_path, f"--model={model}", "--port=0", *too_long) as launcher:
        assert launcher.wait(START_S) == 1
        assert "while starting" in launcher.log
        assert "last lines of" in launcher.log
        assert descendants(launcher.pid) == []


def test_wrong_settings_are_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    taken = free_port()
    cases = {
        ("--blok-size=3",): "--block-size",
        ("--prefill=0", "--decode=0"): "can't both be 0",
        ("--model=/nowhere/at/all", f"--port={taken}"): "/nowhere/at/all",
        (f"--model={model}", "--host=192.0.2.1", f"--port={taken}"): str(taken),
    }
    for options, message in cases.items():
        with served(tmp_path, *options) as launcher:
            assert launcher.wait(20) == 2
            assert message in launcher.log
            assert "Traceback" not in launcher.log
