import subprocess
import sys
from pathlib import Path

from engine.kernels.compiled_once import compiled_once
from tests.support.engine import FakeClock

COMPILES = """
import sys
from pathlib import Path
from engine.kernels.compiled_once import compiled_once

with compiled_once(Path(sys.argv[1]), "kernels", print):
    sys.stdin.read()
"""


def told_by(folder: Path, **options: object) -> list[str]:
    """What progress is told while this process wants the same."""
    told: list[str] = []
    with compiled_once(folder, "kernels", told.append, **options):
        pass
    return told


def test_only_the_first_compiles(tmp_path: Path) -> None:
    assert told_by(tmp_path) == ["compiling kernels (once)"]
    assert told_by(tmp_path) == []


def test_what_failed_is_compiled_again(tmp_path: Path) -> None:
    try:
        with compiled_once(tmp_path, "kernels", lambda _: None):
            raise RuntimeError("no compiler")
    except RuntimeError:
        pass
    assert told_by(tmp_path) == ["compiling kernels (once)"]


def test_another_process_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", COMPILES, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"compiling kernels (once)\n"
        waiting = "waiting for another process that compiles kernels"

        clock = FakeClock()
        told: list[str] = []

        def progress(said: str) -> None:
            told.append(said)
            clock.now += 100

        with compiled_once(tmp_path, "kernels", progress, clock=clock):
            pass
        assert told == [waiting, "compiling kernels (once)"]
        (tmp_path / "compiled").unlink()

        told.clear()

        def let_it_end(said: str) -> None:
            told.append(said)
            other.stdin.close()

        with compiled_once(tmp_path, "kernels", let_it_end):
            pass
        assert told == [waiting]
