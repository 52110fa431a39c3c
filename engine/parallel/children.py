"""The processes of ranks 1 and up, as rank 0 starts, watches and ends them.

Owned by one MultiProcessExecutor. A thread listens to the children and looks at the clock while
rank 0 is inside a step, where it may be waiting for them with no way out. Invariant: the first
failure is the one everybody is told of, and after it no child lives and no step runs: ranks that
are out of step can't be brought back into it.
"""

import logging
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from core.errors import DiptychError, ErrorCode
from engine.executor import ExecutorLostError
from engine.parallel.other_ranks import PipesToRanks
from engine.parallel.pipe import Frame, PipeClosedError, RankPipe, failure_from

log = logging.getLogger(__name__)

_OUT_OF_STEP = " The ranks are out of step, so this engine serves nothing more; restart the worker."
_MAX_POLL_S = 0.25
_CLOSE_S = 10.0
_KILL_S = 5.0
_VERDICT_S = 1.0
"""How long a failed step waits for word of a lost rank, which says more than its own error."""


class Collectives(Protocol):
    """What the watch needs of rank 0's group."""

    calls: int
    """Grows with every collective, so that a long step is told from one that stands still."""

    def abort(self) -> None:
        """Make collectives under way return."""
        ...


@dataclass(slots=True, eq=False)
class _Child:
    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: RankPipe
    ready: bool = False


class RankProcesses:
    """The children, and the thread that watches them."""

    def __init__(self, rank_timeout_s: float) -> None:
        """Args: rank_timeout_s is how long a step may stand still."""
        self._timeout_s = rank_timeout_s
        self._poll_s = min(_MAX_POLL_S, rank_timeout_s / 4)
        self._children: list[_Child] = []
        self._group: Collectives | None = None
        self._state = threading.Condition()
        self.side = PipesToRanks(self, self._state)
        """What shares the pipes with the engine."""
        self._error: DiptychError | None = None
        self._steps = 0
        self._in_step = False
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank from 1."""
        return [child.process.pid for child in self._children]

    def start(
        self,
        command: Sequence[str],
        starts: Sequence[bytes],
        *,
        env: Mapping[str, str],
        store_fd: int,
    ) -> None:
        """Start one child for each of `starts` and tell it what to build.

        Args:
            command: of a child; the descriptor of its pipe is added.
            starts: bodies of START frames, by rank from 1.
            env: whole environment of the children.
            store_fd: inherited under the same number.
        """
        for rank in range(1, len(starts) + 1):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    env=dict(env),
                    pass_fds=(theirs.fileno(), store_fd),
                )
            self._children.append(_Child(rank, process, RankPipe(ours, self._timeout_s)))
        for child, start in zip(self._children, starts, strict=True):
            with suppress(PipeClosedError):  # it died at once: the watch says how
                child.pipe.send(Frame.START, start)
        self._thread.start()

    def attach(self, group: Collectives) -> None:
        """From now on, a failure ends this group's collectives."""
        self._group = group

    @property
    def error(self) -> DiptychError | None:
        """The failure, if there was one."""
        return self._error

    def check(self) -> None:
        """Raise the failure, if there was one.

        Raises:
            DiptychError: of the code that a rank failed with while it loaded.
            ExecutorLostError: once all were ready.
        """
        if self._error is not None:
            raise type(self._error)(self._error.message, code=self._error.code)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every child can take steps.

        Raises:
            DiptychError: one can't, or not in time; see `check`.
        """
        with self._state:
            self._state.wait_for(lambda: self._error is not None or self._ready, timeout_s)
            late = [child.rank for child in self._children if not child.ready]
        if late:
            self.fail(f"Ranks {late} were not ready within {timeout_s:.0f} s.")
        self.check()

    def send(self, kind: Frame, body: bytes) -> None:
        """Send a frame to every child.

        Raises:
            PipeClosedError: one of them does not take it.
        """
        for child in self._children:
            child.pipe.send(kind, body)

    @contextmanager
    def step(self) -> Iterator[None]:
        """For as long as rank 0 computes, or waits for what is being computed.

        Raises:
            ExecutorLostError: a rank was lost or stood still, or the step failed on rank 0.
        """
        self.check()
        self._steps += 1
        self._in_step = True
        try:
            yield
        except Exception as error:
            self.explain(error, f"A step failed on rank 0: {type(error).__name__}: {error}.")
            raise
        except BaseException:
            self.fail("A step was interrupted on rank 0.")
            raise
        finally:
            self._in_step = False
        # Collectives that were ended early leave numbers that mean nothing.
        self.check()

    def explain(self, error: Exception, reason: str) -> None:
        """Give up after an error on rank 0, and raise what caused it if that was another rank."""
        with self._state:
            self._state.wait_for(lambda: self._error is not None, _VERDICT_S)
            caused_here = self._error is None
        self.fail(reason, error.code if isinstance(error, DiptychError) else ErrorCode.INTERNAL)
        if not caused_here or self._ready:
            try:
                self.check()
            except DiptychError as cause:
                raise cause from error

    def fail(self, reason: str, code: ErrorCode = ErrorCode.WORKER_LOST) -> None:
        """Give up: end the children and what waits for them. The first reason stays.

        Args:
            reason: sentences for the user.
            code: of a failure before all ranks were ready.
        """
        with self._state:
            if self._error is not None or self._closing:
                return
            if self._ready:
                self._error = ExecutorLostError(reason + _OUT_OF_STEP)
            else:
                self._error = DiptychError(reason, code=code)
            self._state.notify_all()
        log.error("%s", self._error.message)
        for child in self._children:
            child.process.kill()
        if self._group is not None:
            self._group.abort()

    def begin_close(self) -> None:
        """Ask the children to end. That they do is no failure from now on."""
        with self._state:
            self._closing = True
        for child in self._children:
            with suppress(PipeClosedError):
                child.pipe.send(Frame.CLOSE)

    def close(self) -> None:
        """Wait until the children have ended, then kill. Idempotent."""
        self.begin_close()
        deadline = time.monotonic() + _CLOSE_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("rank %d did not end within %.0f s: killing it", child.rank, _CLOSE_S)
                child.process.kill()
                child.process.wait(_KILL_S)
        if self._thread.ident is not None:
            self._thread.join(_KILL_S)
        for child in self._children:
            child.pipe.close()
        self._children.clear()

    @property
    def _ready(self) -> bool:
        return all(child.ready for child in self._children)

    def _watch(self) -> None:
        seen, since = (0, 0), time.monotonic()
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.pipe, selectors.EVENT_READ, child)
            while not self._closing and self._error is None:
                for key, _ in selector.select(self._poll_s):
                    self._hear(key.data)
                now = (self._steps, self._group.calls if self._group is not None else 0)
                if not self._in_step or now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > self._timeout_s:
                    self.fail(f"A step stood still for {self._timeout_s:.1f} s.")

    def _hear(self, child: _Child) -> None:
        try:
            kind, body = child.pipe.receive()
        except PipeClosedError:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(_VERDICT_S)
            self.fail(f"Rank {child.rank} {_end_of(child.process)}.")
            return
        if kind is Frame.SIDE:
            self.side.take(child.rank, body)
            return
        if kind is Frame.READY:
            with self._state:
                child.ready = True
                self._state.notify_all()
            return
        code, message = failure_from(body)
        self.fail(f"Rank {child.rank} failed: {message}", code)


def _end_of(process: "subprocess.Popen[bytes]") -> str:
    code = process.poll()
    if code is None:
        return f"(pid {process.pid}) closed its pipe"
    if code < 0:
        return f"(pid {process.pid}) was ended by signal {signal.Signals(-code).name}"
    return f"(pid {process.pid}) ended with status {code}"
