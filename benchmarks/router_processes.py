"""The processes that the router benchmark measures: started, asked for their cost, ended."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S = 60.0
END_S = 10.0
_MEASURED = {min(os.sched_getaffinity(0))}
"""Core of what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A process that listens."""

    pid: int
    port: int

    @property
    def cpu_s(self) -> float:
        """CPU time of all its threads so far, in steps of a hundredth second."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        """Its memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def keep_a_core_free() -> None:
    """Leave the first core to what is measured, if there is another for this process."""
    others = os.sched_getaffinity(0) - _MEASURED
    if others:
        os.sched_setaffinity(0, others)


@contextmanager
def workers(
    kind: str, *, count: int = 1, rate: float = 0.0, together: int = 1, measured: bool = False
) -> Iterator[list[Server]]:
    """A process of benchmarks.router_worker; see there. Of `http` there is one."""
    command = [sys.executable, "-m", "benchmarks.router_worker", kind]
    command += [f"--count={count}", f"--rate={rate}", f"--together={together}"]
    with _running(command, stdout=subprocess.PIPE, measured=measured) as child:
        assert child.stdout is not None
        yield [Server(pid=child.pid, port=int(port)) for port in child.stdout.readline().split()]


@contextmanager
def router(model: Path, workers: Sequence[Server]) -> Iterator[Server]:
    """Our router with default settings, once it is ready."""
    port = _free_port()
    addresses = ",".join(f"127.0.0.1:{each.port}" for each in workers)
    command = [sys.executable, "-m", "router", f"--model={model}", f"--port={port}"]
    command += [f"--decode={addresses}", "--log-level=warning"]
    with _running(command, measured=True) as child:
        _wait(child, port, "/ready")
        yield Server(pid=child.pid, port=port)


@contextmanager
def peer_router(program: str, behind: Server) -> Iterator[Server]:
    """A peer in front of a worker that speaks HTTP, once it passes requests on."""
    port = _free_port()
    command = [*shlex.split(program), "--host=127.0.0.1", f"--port={port}"]
    command += [f"--prometheus-port={_free_port()}"]
    command += ["--worker-urls", f"http://127.0.0.1:{behind.port}"]
    with _running(command, stdout=subprocess.DEVNULL, measured=True) as child:
        _wait(child, port, "/v1/models")
        yield Server(pid=child.pid, port=port)


@contextmanager
def _running(
    command: Sequence[str], *, measured: bool, stdout: int | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    child = subprocess.Popen(command, stdout=stdout, start_new_session=True)
    if measured:
        os.sched_setaffinity(child.pid, _MEASURED)
    try:
        yield child
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _wait(child: "subprocess.Popen[bytes]", port: int, path: str) -> None:
    """Until it answers a GET well.

    Raises:
        RuntimeError: it ended, or did not within START_S.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and child.poll() is None:
        with suppress(OSError), opener.open(f"http://127.0.0.1:{port}{path}", timeout=2):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{child.args!r} does not serve: exit code {child.poll()}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
