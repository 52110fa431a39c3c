"""A Ray cluster of two hosts on loopback, as processes of their own that end with the context."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.process import command_line, descendants, free_port, running

HOSTS = ("127.0.0.2", "127.0.0.3")
"""Not 127.0.0.1, for which Ray puts the machine's own address."""
_START_S = 60.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Where it is, its processes and its files."""

    address: str
    pids: tuple[int, ...]
    folder: Path

    def actors(self) -> list[int]:
        """Processes that hold a node of a worker, or are about to."""
        below = [pid for parent in self.pids for pid in descendants(parent)]
        return [pid for pid in below if command_line(pid).startswith("ray::NodeActor")]

    def bytes_kept(self) -> bytes:
        """Whatever Ray has written to its files, logs among them."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return b"\n".join(path.read_bytes() for path in files if path.stat().st_size < 1 << 24)


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Two raylets of one core each; the folder is short, for sockets lie in it."""
    address = f"{HOSTS[0]}:{free_port()}"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="ray"))
        pids = []
        for host in HOSTS:
            where = (
                *("--head", "--port", address.rpartition(":")[2], "--temp-dir", folder),
                *("--ray-client-server-port", str(free_port()), "--include-dashboard", "false"),
            )
            command = [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *(where if host == HOSTS[0] else ("--address", address, "--temp-dir", folder)),
                *("--node-ip-address", host, "--num-cpus", "1"),
                *("--min-worker-port", "0", "--max-worker-port", "0"),
                *("--object-store-memory", str(80 << 20)),
                *("--disable-usage-stats", "--include-log-monitor", "false"),
            ]
            env = {**_QUIET, "PYTHONPATH": os.getcwd()}
            process = stack.enter_context(running(command, name=f"ray at {host}", env=env))
            process.wait_for_line("will now block", _START_S)
            pids.append(process.pid)
        yield RayCluster(address, tuple(pids), Path(folder))
