"""Real processes in tests: start with log capture, wait with a deadline, kill, freeze, clean up.

Every process gets a session of its own, and leaving the context kills that whole group, so that a
failing test leaves nothing behind. Nothing is ever killed by name.
"""

import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 0.02
_PORTS = range(10_000, 15_000)


class Process:
    """A running child and everything it printed."""

    def __init__(self, popen: "subprocess.Popen[str]", name: str) -> None:
        self.popen = popen
        self.name = name
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def log(self) -> str:
        """Standard output and error so far."""
        return "\n".join(self._lines)

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Exit code; fails with the log when the deadline passes."""
        try:
            code = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} still runs after {timeout_s} s:\n{self.log}"
            ) from None
        self._reader.join(timeout_s)
        return code

    def wait_for_line(self, text: str, timeout_s: float) -> str:
        """The first line that holds `text`; fails when the process ends without it."""

        def find() -> str | None:
            ended = not self.running
            if ended:
                self._reader.join(1)
            found = next((line for line in list(self._lines) if text in line), None)
            assert found or not ended, f"{self.name} ended without {text!r}:\n{self.log}"
            return found

        return wait_until(find, timeout_s, f"{self.name} to print {text!r}", lambda: self.log)

    def kill_group(self) -> None:
        """SIGKILL to the process and all of its session; idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(10)
        self._reader.join(2)
        if self.popen.stdout is not None and not self._reader.is_alive():
            self.popen.stdout.close()


@contextmanager
def running(
    command: Sequence[str],
    *,
    name: str = "",
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> Iterator[Process]:
    """Run a command in a session of its own; kills the session's process group at the end.

    Args:
        command: program and arguments.
        name: for messages; default: the program.
        env: added to this process's environment.
        cwd: folder to start in.
    """
    popen = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        cwd=cwd,
        start_new_session=True,
    )
    process = Process(popen, name or command[0])
    try:
        yield process
    finally:
        process.kill_group()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """SIGSTOP for the length of the block, then SIGCONT if the process is still there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGCONT)


def wait_until(
    condition: Callable[[], T | None],
    timeout_s: float,
    what: str,
    detail: Callable[[], str] = str,
) -> T:
    """Ask `condition` until it answers something true, and return that.

    Fails with what was awaited and `detail()` when `timeout_s` has passed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}\n{detail()}")
        time.sleep(_POLL_S)


def http_status(url: str, timeout_s: float = 2.0) -> int | None:
    """Status of a GET; None when nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None


def free_port() -> int:
    """A loopback port that nothing listens on, given to nobody else in this test run."""
    return next(_free_ports())


@cache
def _free_ports() -> Iterator[int]:
    """This process's share of the ports that tests listen on, in random order.

    They lie below those that `diptych serve` chooses from, and below the range of outgoing
    connections. Each process of a test run has a share of its own, and gives none out twice: a
    child that was given one takes seconds until it listens.
    """
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = _PORTS[share::count]

    def unused() -> Iterator[int]:
        for port in random.sample(ports, len(ports)):
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            yield port

    return unused()


def alive(pid: int) -> bool:
    """True if the process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """Pids of all processes below `pid` now, children before grandchildren."""
    below: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            below.setdefault(parent, []).append(int(entry))
    found = list(below.get(pid, ()))
    for child in found:
        found.extend(below.get(child, ()))
    return found


def command_line(pid: int) -> str:
    """The arguments of a process, joined by spaces; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
