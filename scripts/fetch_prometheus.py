"""Fetch prometheus and promtool: `python scripts/fetch_prometheus.py` prints their folder.

Tests of dashboards and rules call `fetch`. Programs on PATH are taken; else Debian's package is
downloaded and unpacked, not installed, which needs no root. The folder `.venv/prometheus` appears
complete or not at all, so processes may fetch at once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" / "prometheus"
DEADLINE_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusTools:
    """Paths of the two programs."""

    prometheus: Path
    promtool: Path


class PrometheusUnavailable(RuntimeError):
    """The programs can't be had here; the message says why. Tests skip themselves on it."""


def fetch(cache: Path = CACHE) -> PrometheusTools:
    """The programs on PATH, or those in `cache`, downloaded if it lacks them (19 MB, seconds).

    Raises:
        PrometheusUnavailable: neither on PATH, nor to be had through apt-get.
    """
    on_path = [shutil.which(name) for name in ("prometheus", "promtool")]
    if on_path[0] and on_path[1]:
        return PrometheusTools(prometheus=Path(on_path[0]), promtool=Path(on_path[1]))
    tools = PrometheusTools(
        prometheus=cache / "usr/bin/prometheus", promtool=cache / "usr/bin/promtool"
    )
    if cache.is_dir():
        return tools
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise PrometheusUnavailable(
                f"prometheus and promtool are not on PATH, and there is no {program} to fetch them"
            )
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        _run(["apt-get", "download", "prometheus"], Path(scratch))
        packages = list(Path(scratch).glob("prometheus_*.deb"))
        if len(packages) != 1:
            raise PrometheusUnavailable("apt-get download prometheus left no package behind")
        unpacked = Path(scratch) / "root"
        _run(["dpkg", "-x", str(packages[0]), str(unpacked)], Path(scratch))
        try:
            os.rename(unpacked, cache)
        except OSError:
            if not cache.is_dir():
                raise
    return tools


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise PrometheusUnavailable(
            f"`{' '.join(command)}` did not end within {DEADLINE_S} s"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PrometheusUnavailable(f"`{' '.join(command)}` failed: {reason}")


def main() -> int:
    """Print where they are."""
    try:
        tools = fetch()
    except PrometheusUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{tools.prometheus.parent}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
