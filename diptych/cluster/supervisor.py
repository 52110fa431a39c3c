"""Keeps the processes of a cluster running, and ends them in order.

One asyncio task owns each child. Until the cluster is ready a child that ends is a failed start;
from then on it is started again, after a growing pause, until it has failed too often in a row.
Every child leads a process group, and the group is killed whenever its leader has ended: nothing
that a child started outlives it.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from core.clock import Clock, monotonic
from core.errors import DiptychError
from diptych.cluster.logfiles import ChildLog
from diptych.cluster.plan import ChildSpec, Role

_MAX_LINE_BYTES = 1 << 20
_LAST_WORDS_S = 2.0
STOP_ORDER: tuple[tuple[Role, float], ...] = (("router", 25.0), ("decode", 15.0), ("prefill", 15.0))
"""Who is asked to end when, and seconds until it is killed. The router goes first: its requests end
well while the workers still serve them, and the workers then have nothing left to drain."""


class ClusterFailedError(DiptychError):
    """A process could not be kept running; the message holds its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a child that ended is started again."""

    first_delay_s: float = 0.2
    max_delay_s: float = 10.0
    steady_after_s: float = 30.0
    """A child that ran this long before it ended counts as having worked."""
    max_failures: int = 5
    """Ends in a row, each before it was steady, after which there is no other start."""

    def delay_s(self, failures: int) -> float | None:
        """Pause before the next start after so many failures in a row; None: give up."""
        if failures > self.max_failures:
            return None
        return min(self.first_delay_s * 2.0 ** max(failures - 1, 0), self.max_delay_s)


class _Child:
    """One process of the cluster over all its lives."""

    def __init__(self, spec: ChildSpec, log: ChildLog) -> None:
        self.spec = spec
        self.log = log
        self.ended = asyncio.Event()
        self.ended.set()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, stopping: asyncio.Event) -> int:
        """Start it, relay what it prints until it ends, and return its exit code.

        Raises:
            OSError: it can't be started.
        """
        self.ended.clear()
        try:
            return await self._run(stopping)
        finally:
            self.ended.set()

    async def _run(self, stopping: asyncio.Event) -> int:
        # A pipe of our own: asyncio's wait() for a child with pipes of its making lasts until they
        # are closed, and what the child started may hold them open.
        reading_end, writing_end = os.pipe()
        with os.fdopen(reading_end, "rb") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self.spec.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=writing_end,
                    stderr=asyncio.subprocess.STDOUT,
                    env={**os.environ, **self.spec.env},
                    start_new_session=True,
                )
            finally:
                os.close(writing_end)
            self._process = process
            if stopping.is_set():
                self.signal(signal.SIGKILL)
            reading = asyncio.create_task(self._read(output))
            try:
                return await process.wait()
            finally:
                self.signal(signal.SIGKILL)
                self._process = None
                await asyncio.wait({reading}, timeout=_LAST_WORDS_S)
                reading.cancel()
                await asyncio.wait({reading})

    async def _read(self, output: IO[bytes]) -> None:
        stream = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), output
        )
        try:
            await self._relay(stream)
        finally:
            transport.close()

    async def _relay(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                self.log.write(f"(a line of more than {_MAX_LINE_BYTES} bytes was left out)")
                continue
            if not line:
                return
            self.log.write(line.decode(errors="replace").rstrip("\r\n"))

    def signal(self, number: signal.Signals) -> None:
        """Send to the child (SIGKILL: to its whole process group), if it runs."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                os.kill(self._process.pid, number)


class Supervisor:
    """Runs the children of a plan: `start`, then `mark_ready`, finally and always `stop`."""

    def __init__(
        self,
        logs: Sequence[tuple[ChildSpec, ChildLog]],
        *,
        policy: RestartPolicy,
        tell: Callable[[str], None],
        clock: Clock = monotonic,
    ) -> None:
        """`tell` shows the user one line."""
        self._children = [_Child(spec, log) for spec, log in logs]
        self._policy = policy
        self._tell = tell
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = False
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[ClusterFailedError] = asyncio.Future()

    def start(self) -> None:
        """Start every child, in the order given."""
        self._tasks = [
            asyncio.create_task(self._keep(child), name=child.spec.name) for child in self._children
        ]

    def mark_ready(self) -> None:
        """From now on a child that ends is started again."""
        self._ready = True

    async def failed(self) -> ClusterFailedError:
        """Waits for a failure that ends the cluster, and returns it; maybe for ever."""
        return await asyncio.shield(self._failure)

    def fail(self, message: str, *, of: str | None = None) -> ClusterFailedError:
        """The error for a cluster that can't go on, with the last lines of one child or of all."""
        parts = [message]
        for child in self._children:
            if of in (None, child.spec.name):
                tail = child.log.tail or "(it printed nothing)"
                parts.append(f"--- {child.spec.name}, last lines of {child.log.path}\n{tail}")
        return ClusterFailedError("\n".join(parts))

    async def _keep(self, child: _Child) -> None:
        failures = 0
        name = child.spec.name
        while not self._stopping.is_set():
            began = self._clock()
            try:
                how = describe_exit(await child.run(self._stopping))
            except OSError as error:
                how = f"could not be started: {error}"
            if self._stopping.is_set():
                return
            lasted = self._clock() - began
            failures = 0 if lasted >= self._policy.steady_after_s else failures + 1
            delay_s = self._policy.delay_s(failures) if self._ready else None
            if delay_s is None:
                when = f"{failures} times in a row" if self._ready else "while starting"
                if not self._failure.done():
                    self._failure.set_result(self.fail(f"{name} {how}, {when}.", of=name))
                return
            self._tell(f"{name} {how}; starting it again in {delay_s:.1f} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    async def stop(self, order: Sequence[tuple[Role, float]] = STOP_ORDER) -> None:
        """End every child: SIGTERM role by role, SIGKILL after each role's deadline."""
        self._stopping.set()
        for role, deadline_s in order:
            wave = [child for child in self._children if child.spec.role == role]
            for child in wave:
                child.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(deadline_s):
                    for child in wave:
                        await child.ended.wait()
            except TimeoutError:
                late = [child.spec.name for child in wave if not child.ended.is_set()]
                self._tell(f"{', '.join(late)} did not end within {deadline_s:.0f} s: killing")
        self.kill()
        await asyncio.gather(*self._tasks)

    def kill(self) -> None:
        """SIGKILL to everything, at once."""
        for child in self._children:
            child.signal(signal.SIGKILL)


def describe_exit(code: int) -> str:
    """In words, how a process ended."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
