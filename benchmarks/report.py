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

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "nixl-cu12", "grpcio", "uvicorn")


def median(values: Sequence[float]) -> float:
    """The middle of the raw samples."""
    return statistics.median(values)


@dataclass
class Report:
    """Figures of one run, each with its raw samples."""

    name: str
    settings: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self, name: str, value: float, unit: str, *, samples: Sequence[float] = (), goal: str = ""
    ) -> None:
        """Keep a figure and print it."""
        self.figures[name] = {
            "value": value,
            "unit": unit,
            "goal": goal,
            "samples": list(samples),
        }
        wanted = f"   (goal {goal})" if goal else ""
        print(f"{name:<58} {value:10.3f} {unit}{wanted}", flush=True)

    def save(self) -> Path:
        """Write benchmarks/results/<name>-<date>-<commit>.json."""
        commit = _git("rev-parse", "--short", "HEAD")
        document = {
            "name": self.name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "machine": machine(),
            "settings": self.settings,
            "figures": self.figures,
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}-{datetime.now(UTC):%Y-%m-%d}-{commit}.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
        return path


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
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip()
