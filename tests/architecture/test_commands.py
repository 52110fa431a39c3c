"""What the documents tell a reader to type is there."""

import re
import subprocess
from pathlib import Path

import pytest

from diptych.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def code(document: Path) -> str:
    return "\n".join(CODE.findall(document.read_text()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_document_exist(document: Path) -> None:
    text = code(document)
    for target in re.findall(r"(?:^|`|\$ )make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert target in TARGETS, f"make {target}"
    for command in re.findall(r"(?:^|`|\$ )diptych ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS, f"diptych {command}"


def test_make_help_explains_every_target() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == TARGETS
