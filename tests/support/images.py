"""deploy/images as tests read it: the stages of its Dockerfile, and what a builder is sent."""

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "images" / "Dockerfile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    """Another stage, or an image of a registry."""
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instructions, each with its arguments as they are written."""

    def all(self, instruction: str) -> list[str]:
        """Arguments of each such instruction."""
        return [words for name, words in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        """Arguments of the one that holds; empty if there is none."""
        return (self.all(instruction) or [""])[-1]

    def exec_form(self, instruction: str) -> list[list[str]]:
        """Words of each such instruction, which must be in the form that needs no shell."""
        return [json.loads(words[words.index("[") :]) for words in self.all(instruction)]


def stages() -> dict[str, Stage]:
    """All stages of the Dockerfile, in order."""
    found: dict[str, Stage] = {}
    for line in _lines(DOCKERFILE.read_text()):
        instruction, _, words = line.partition(" ")
        if instruction == "FROM":
            base, _, name = words.partition(" AS ")
            found[name] = Stage(name=name, base=base)
        else:
            list(found.values())[-1].steps.append((instruction, words.strip()))
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those that it is from, the oldest first."""
    known = stages()
    line = [known[name]]
    while line[0].base in known:
        line.insert(0, known[line[0].base])
    return line


def variables(name: str) -> dict[str, str]:
    """ENV of an image. PATH is what is put before that of its base."""
    pairs = (
        pair.partition("=")
        for stage in lineage(name)
        for words in stage.all("ENV")
        for pair in shlex.split(words)
    )
    return {key: value.removesuffix(":$PATH") for key, _, value in pairs}


def sent_to_builders(folder: Path) -> None:
    """Copy what .dockerignore lets through."""
    for name in _allowed():
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, target)


def _allowed() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", ".dockerignore must begin by leaving out everything"
    return [rule.removeprefix("!") for rule in rules if rule.startswith("!")]


def _lines(text: str) -> Iterator[str]:
    whole = ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        whole += line.strip().removesuffix("\\")
        if not line.endswith("\\"):
            yield whole
            whole = ""
