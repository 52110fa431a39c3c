"""A Ray cluster of one host on loopback, as processes of their own that end with the context."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.process import command_line, descendants, free_port, running

RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Lets Ray take 127.0.0.1 for the address of a host, at which alone it then listens.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Of every process that has to do with it."""
CORES = 2
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Where it is, its processes and its files."""

    address: str
    pid: int
    folder: Path

    def actors(self) -> list[int]:
        """Processes that hold a node of a worker, the leader's place among them."""
        below = descendants(self.pid)
        return [pid for pid in below if command_line(pid).startswith("ray::NodeActor")]

    def bytes_kept(self) -> bytes:
        """Whatever Ray has written to its files, logs among them."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return b"\n".join(path.read_bytes() for path in files if path.stat().st_size < 1 << 24)


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Start it, without a dashboard. Its folder's name is short, for sockets lie in it."""
    port = free_port()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--port", str(port), "--ray-client-server-port", str(free_port())),
            *("--temp-dir", folder, "--node-ip-address", "127.0.0.1", "--num-cpus", str(CORES)),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--object-store-memory", str(80 << 20), "--include-dashboard", "false"),
            *("--disable-usage-stats", "--include-log-monitor", "false"),
        ]
        env = {**RAY_ENV, "PYTHONPATH": os.getcwd()}
        with running(command, name="ray", env=env) as process:
            process.wait_for_line("will now block", _START_S)
            yield RayCluster(f"127.0.0.1:{port}", process.pid, Path(folder))
