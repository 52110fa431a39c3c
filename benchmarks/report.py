"""One way to write results: a JSON file with everything needed to judge it, and a short table."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MAX_SAMPLES = 1000
"""Kept of one figure, about."""
RESULTS = Path(__file__).parent / "results"
COMMIT, DIRTY = "DIPTYCH_COMMIT", "DIPTYCH_DIRTY"
"""Environment of a copy: the commit it was made from, and 0 or 1."""
_PACKAGES = (
    *("torch", "triton", "flashinfer-python", "transformers", "nixl-cu12", "nixl-cu13"),
    *("grpcio", "uvicorn", "llguidance", "xgrammar"),
)


def median(values: Sequence[float]) -> float:
    """The middle of the raw samples."""
    return statistics.median(values)


@dataclass
class Report:
    """Figures of one run, each with its raw samples."""

    name: str
    settings: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)
    """What is known of the GPU, if one was measured."""
    details: dict[str, Any] = field(default_factory=dict)
    """More than one number per name: profiles, output of other engines."""
    quiet: bool = False
    """Print figures by `show` only, not as they come."""

    def add(
        self, name: str, value: float, unit: str, *, samples: Sequence[float] = (), goal: str = ""
    ) -> None:
        """Keep a figure, and print it unless `quiet`. Of many samples an even share is kept."""
        self.figures[name] = {
            "value": value,
            "unit": unit,
            "goal": goal,
            "samples": list(samples)[:: 1 + len(samples) // MAX_SAMPLES],
        }
        if not self.quiet:
            self._print(name)

    def show(self) -> None:
        """Print all figures."""
        for name in self.figures:
            self._print(name)

    def _print(self, name: str) -> None:
        figure = self.figures[name]
        wanted = f"   (goal {figure['goal']})" if figure["goal"] else ""
        print(f"{name:<66} {figure['value']:12,.3f} {figure['unit']}{wanted}", flush=True)

    def save(self, folder: Path = RESULTS) -> Path:
        """Write <folder>/<name>-<date>-<commit>.json, over what has the same name."""
        commit, dirty = revision()
        now = datetime.now(UTC)
        document = {
            "name": self.name,
            "at": now.isoformat(timespec="seconds"),
            "commit": commit,
            "dirty": dirty,
            "machine": machine() | ({"gpu": self.gpu} if self.gpu else {}),
            "settings": self.settings,
            "figures": self.figures,
        } | ({"details": self.details} if self.details else {})
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{now:%Y-%m-%d}-{commit}.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
        return path


def revision() -> tuple[str, bool | None]:
    """Commit, and whether tracked files differ from it (None: nobody knows).

    What the environment says comes first: git may know of another commit than a copy was made from.
    """
    if commit := os.environ.get(COMMIT):
        return commit, {"0": False, "1": True}.get(os.environ.get(DIRTY, ""))
    if commit := _git("rev-parse", "--short", "HEAD"):
        return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))
    return "unknown", None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:  # there is no git
        return ""
    return done.stdout.strip()
