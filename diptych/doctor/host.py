"""Facts about the machine or the pod that the doctor runs in. Nothing is judged here."""

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.modelfile.digest import model_digest
from core.modelfile.resolve import DEMO, resolve_model
from diptych.doctor.probe import MODULES

PROBE_S = 120.0
"""Longest that importing a package may take: torch from a cold network disk is slow."""
UCX_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """See the module. Sizes in bytes."""

    python: str
    packages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name to what diptych.doctor.probe printed."""
    driver: str = ""
    """Version of the NVIDIA driver; empty without one."""
    rdma: Mapping[str, str] = field(default_factory=dict)
    """RDMA device to the state of its best port."""
    transports: Sequence[str] = ()
    """What UCX can move bytes by: of ucx_info if there is one, else the parts NIXL comes with."""
    ucx_tls: str = ""
    shm_bytes: int = 0
    memlock_bytes: int | None = None
    """Memory that may be pinned; None: no limit."""
    ports: Mapping[int, str] = field(default_factory=dict)
    """Port that should be free to why it is not; empty if it is."""
    model: str = ""
    model_error: str = ""
    model_digest: str = ""


def look_at_host(model: str | None, ports: Sequence[int], *, packages: bool) -> HostFacts:
    """Gather everything.

    Args:
        model: that workers here load; None: not looked at.
        ports: that should be free.
        packages: look at what only workers need.
    """
    digest, error = _model(model) if model else ("", "")
    return HostFacts(
        python=platform.python_version(),
        packages={name: probe(name) for name in MODULES} if packages else {},
        driver=driver_version(Path("/proc/driver/nvidia/version")),
        rdma=rdma_devices(Path("/sys/class/infiniband")),
        transports=ucx_transports() if packages else (),
        ucx_tls=os.environ.get("UCX_TLS", ""),
        shm_bytes=shm_bytes(Path("/dev/shm")),
        memlock_bytes=memlock_bytes(),
        ports={port: taken(port) for port in ports},
        model=model or "",
        model_error=error,
        model_digest=digest,
    )


def probe(name: str) -> dict[str, Any]:
    """What a package says of itself, asked in a process of its own."""
    command = [sys.executable, "-m", "diptych.doctor.probe", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
        # Libraries print what they like before; ours is the last line.
        found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
        return found
    except subprocess.TimeoutExpired:
        return {"error": f"importing it took longer than {PROBE_S:.0f} s"}
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        return {"error": f"importing it ended the process with {done.returncode}: {last}"}


def driver_version(path: Path) -> str:
    """Of the kernel's NVIDIA driver."""
    try:
        words = path.read_text(encoding="utf-8").split("\n", 1)[0].split()
    except OSError:
        return ""
    numbers = [word for word in words if word[0].isdigit() and "." in word]
    return numbers[0] if numbers else "unknown"


def rdma_devices(root: Path) -> dict[str, str]:
    """Device to the state of its best port, as in `ACTIVE`."""
    found = {}
    for device in sorted(root.glob("*")):
        states = []
        for state in device.glob("ports/*/state"):
            try:
                states.append(state.read_text(encoding="utf-8").partition(":")[2].strip())
            except OSError:
                continue
        found[device.name] = "ACTIVE" if "ACTIVE" in states else (states or ["unknown"])[0]
    return found


def ucx_transports() -> list[str]:
    """What UCX can move bytes by."""
    tool = shutil.which("ucx_info")
    if tool is not None:
        try:
            done = subprocess.run(
                [tool, "-d"], capture_output=True, text=True, timeout=UCX_S, check=False
            )
            lines = [line.partition("Transport:") for line in done.stdout.splitlines()]
            return sorted({after.strip() for _, found, after in lines if found})
        except (OSError, subprocess.TimeoutExpired):
            pass
    folders = [Path(entry) for entry in sys.path if entry]
    parts = [
        part.name.removeprefix("libuct_").partition(".")[0]
        for folder in folders
        for part in folder.glob("nixl_cu*.libs/ucx/libuct_*.so*")
    ]
    return sorted(set(parts))


def shm_bytes(path: Path) -> int:
    """Size of the shared memory that processes of this host or pod have; 0 without any."""
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return 0


def memlock_bytes() -> int | None:
    """Memory that a process here may pin; None: all."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def taken(port: int) -> str:
    """Why nothing else can listen on a port; empty if it is free."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("0.0.0.0", port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _model(model: str) -> tuple[str, str]:
    """Digest of the model's files, or why they can't be read."""
    if model == DEMO:
        return "", ""
    try:
        return model_digest(resolve_model(model)).hex(), ""
    except ConfigError as error:
        return "", error.message
