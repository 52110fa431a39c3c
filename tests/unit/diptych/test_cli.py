import re
import subprocess
import sys
from pathlib import Path

import pytest

from diptych import cli

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {refused!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Refuse())
from diptych.cli import main
sys.exit(main({argv!r}))
"""


def run_without(refused: set[str], *argv: str) -> "subprocess.CompletedProcess[str]":
    program = WITHOUT_TORCH.format(refused=refused, argv=list(argv))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", printed, re.MULTILINE)


def test_no_command_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: diptych" in capsys.readouterr().out


def test_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prefil"]) == 2
    assert "diptych prefill" in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("diptych ")


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_of_every_command_needs_no_torch(argv: list[str]) -> None:
    done = run_without({"torch"}, *argv)
    assert done.returncode == 0, done.stderr
    assert "usage: diptych" in done.stdout


def test_plain_help_needs_the_standard_library_only() -> None:
    done = run_without({"torch", "pydantic", "grpc", "rich", "yaml", "httpx"}, "--help")
    assert done.returncode == 0, done.stderr


def test_missing_package_says_what_to_install() -> None:
    done = run_without({"starlette"}, "router", "--help")
    assert done.returncode == 2
    assert "'starlette' is not installed" in done.stderr
    assert "diptych[router]" in done.stderr


def test_fault_in_our_own_imports_is_not_taken_for_a_missing_package() -> None:
    done = run_without({"rpc"}, "prefill", "--help")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
