"""The processes of ranks 1 and up, as rank 0 watches and ends them; those of its host it starts.

Owned by one MultiProcessExecutor. A thread listens to them and looks at the clock while rank 0 is
inside a step, where it may be waiting for them with no way out. Invariant: the first failure is the
one everybody is told of, and after it no child lives, no pipe to another node is open and no step
runs: ranks that are out of step can't be brought back into it.
"""

import logging
import math
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from core.errors import DiptychError, ErrorCode
from engine.executor import ExecutorLostError
from engine.parallel.other_ranks import PipesToRanks
from engine.parallel.peers import LocalRank, NodeRanks, Peer
from engine.parallel.pipe import Frame, PipeClosedError, RankPipe, failure_from

log = logging.getLogger(__name__)

_OUT_OF_STEP = " The ranks are out of step, so this engine serves nothing more; restart the worker."
_MAX_POLL_S = 0.25
_CLOSE_S = 10.0
_KILL_S = 5.0
_VERDICT_S = 1.0
"""How long a failed step waits for word of a lost rank, which says more than its own error."""
_SUSPICION_S = 0.5
"""How long another rank's failure waits for the same."""


class Collectives(Protocol):
    """What the watch needs of rank 0's group."""

    calls: int
    """Grows with every collective, so that a long step is told from one that stands still."""

    def abort(self) -> None:
        """Make collectives under way return."""
        ...


class RankProcesses:
    """All ranks but rank 0, and the thread that watches them."""

    def __init__(self, rank_timeout_s: float) -> None:
        """Args: rank_timeout_s is how long a step may stand still."""
        self._timeout_s = rank_timeout_s
        self._poll_s = min(_MAX_POLL_S, rank_timeout_s / 4)
        self._children: list[LocalRank] = []
        self._nodes: list[NodeRanks] = []
        self._group: Collectives | None = None
        self._state = threading.Condition()
        self.side = PipesToRanks(self, self._state)
        """What shares the pipes with the engine."""
        self._error: DiptychError | None = None
        self._steps = 0
        self._in_step = False
        self._failed: list[Peer] = []
        self._suspicion = ("", ErrorCode.INTERNAL)
        """Why the first of them failed."""
        self._suspected_until = math.inf
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Process ids of those on this host, by rank from 1."""
        return [child.process.pid for child in self._children]

    @property
    def count(self) -> int:
        """How many there are, on all hosts."""
        return sum(len(peer.ranks) for peer in self._peers)

    def start(
        self,
        command: Sequence[str],
        starts: Sequence[bytes],
        *,
        env: Mapping[str, str],
        store_fd: int | None,
        nodes: Sequence[socket.socket] = (),
    ) -> None:
        """Start one child for each of `starts`, tell it what to build, and watch all ranks.

        Args:
            command: of a child; the descriptor of its pipe is added.
            starts: bodies of START frames, by rank from 1.
            env: whole environment of the children.
            store_fd: inherited under the same number, if there is one.
            nodes: pipes to the ranks of other nodes, which have as many as this one.
        """
        here = len(starts) + 1
        inherited = () if store_fd is None else (store_fd,)
        for rank in range(1, len(starts) + 1):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    env=dict(env),
                    pass_fds=(theirs.fileno(), *inherited),
                )
            self._children.append(LocalRank(rank, process, RankPipe(ours, self._timeout_s)))
        for node, sock in enumerate(nodes, 1):
            ranks = range(node * here, (node + 1) * here)
            self._nodes.append(NodeRanks(node, ranks, sock, RankPipe(sock, self._timeout_s)))
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
        """Wait until every rank can take steps.

        Raises:
            DiptychError: one can't, or not in time; see `check`.
        """
        with self._state:
            self._state.wait_for(lambda: self._error is not None or self._ready, timeout_s)
            late = [rank for peer in self._peers for rank in peer.ranks if rank not in peer.ready]
        if late:
            self.fail(f"Ranks {late} were not ready within {timeout_s:.0f} s.")
        self.check()

    def send(self, kind: Frame, body: bytes) -> None:
        """Send a frame to every rank.

        Raises:
            PipeClosedError: one of them does not take it.
        """
        for peer in self._peers:
            peer.pipe.send(kind, body)

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
        """Give up: end the ranks and what waits for them. The first reason stays.

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
        for peer in self._peers:
            peer.kill()
        if self._group is not None:
            self._group.abort()

    def begin_close(self) -> None:
        """Ask the ranks to end. That they do is no failure from now on."""
        with self._state:
            self._closing = True
        for peer in self._peers:
            with suppress(PipeClosedError):
                peer.pipe.send(Frame.CLOSE)

    def close(self) -> None:
        """Wait until the ranks have ended, then kill. Idempotent."""
        self.begin_close()
        deadline = time.monotonic() + _CLOSE_S
        if self._thread.ident is not None:
            self._thread.join(_KILL_S)
        for peer in self._peers:
            if not peer.wait(max(0.0, deadline - time.monotonic())):
                name = peer.name(peer.ranks[0])
                log.warning("%s did not end within %.0f s: killing it", name, _CLOSE_S)
                peer.kill()
                peer.wait(_KILL_S)
        for peer in self._peers:
            peer.pipe.close()
        self._children.clear()
        self._nodes.clear()

    @property
    def _peers(self) -> list[Peer]:
        return [*self._children, *self._nodes]

    @property
    def _ready(self) -> bool:
        return all(len(peer.ready) == len(peer.ranks) for peer in self._peers)

    def _watch(self) -> None:
        seen, since = (0, 0), time.monotonic()
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.pipe, selectors.EVENT_READ, peer)
            while not self._closing and self._error is None:
                for key, _ in selector.select(self._poll_s):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = (self._steps, self._group.calls if self._group is not None else 0)
                if self._suspected_until < time.monotonic():
                    self.fail(*self._suspicion)
                elif not self._in_step or now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > self._timeout_s:
                    self.fail(f"A step stood still for {self._timeout_s:.1f} s.")

    def _hear(self, peer: Peer) -> bool:
        """Take one frame; False if there will be none any more."""
        try:
            kind, body, rank = peer.pipe.receive()
        except PipeClosedError:
            if peer not in self._failed:
                self.fail(peer.how_it_ended(_VERDICT_S))
            return False
        if kind is Frame.LOST:
            if peer not in self._failed:
                self.fail(body.decode(errors="replace"))
            return False
        if len(peer.ranks) == 1:
            (rank,) = peer.ranks  # which it may not have been told yet
        if rank not in peer.ranks:
            self.fail(f"{peer.name(peer.ranks[0])} sent something as rank {rank}.")
        elif kind is Frame.SIDE:
            self.side.take(rank, body)
        elif kind is Frame.READY:
            with self._state:
                peer.ready.add(rank)
                self._state.notify_all()
        else:
            code, message = failure_from(body)
            self._suspect(peer, f"{peer.name(rank)} failed: {message}", code)
        return True

    def _suspect(self, peer: Peer, reason: str, code: ErrorCode) -> None:
        """A rank failed: by itself, or since another one is gone, which then says more."""
        if not self._failed:
            self._suspicion = (reason, code)
            self._suspected_until = time.monotonic() + (_SUSPICION_S if self._ready else 0.0)
        self._failed.append(peer)
