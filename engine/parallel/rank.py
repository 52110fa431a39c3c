"""Entry of the process of one rank above 0: builds its share, then takes steps until told to end.

Started by rank 0, or by what stands in for it on another host, with one end of a pipe as an
inherited descriptor. A thread of its own reads the pipe, so that this process ends with rank 0 even
while it is caught in a collective.
"""

import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections import deque
from dataclasses import replace

from engine.build import build_rank
from engine.config import EngineConfig
from engine.devices import usable_device
from engine.executor import Executor, PendingStep
from engine.parallel.host_memory import RankCopies
from engine.parallel.meeting import Meeting, read_start
from engine.parallel.pipe import Frame, PipeClosedError, RankPipe, failure_to
from engine.parallel.plan_codec import PlanDecoder
from engine.parallel.shares import rank_device
from engine.parallel.side import StartSide
from engine.parallel.torch_group import TorchGroup

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_IDLE_S = 0.1
"""How long a step that runs ahead is left alone before its end is waited for."""
_MAX_INBOX = 4096
"""Rank 0 is at most two steps ahead, with a few copies of blocks for each sequence that waits; more
frames than this mean that it has gone astray."""
_MAX_SIDE_INBOX = 1 << 16
_PARENT_CHECK_S = 2.0
_EXIT_ORPHANED = 3


class Inbox:
    """Frames from rank 0, read by a thread that ends the process when rank 0 is gone."""

    def __init__(self, pipe: RankPipe) -> None:
        self._pipe = pipe
        self.side: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # A fork of rank 0 would keep the pipe open, so its end is not the only sign.
        self._parent = os.getppid()
        self._frames: queue.SimpleQueue[tuple[Frame, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="leash", daemon=True).start()

    def next(self, timeout_s: float | None = None) -> tuple[Frame, bytes]:
        """The next frame, waited for until rank 0 is gone; queue.Empty after `timeout_s`."""
        return self._frames.get(timeout=timeout_s)

    @property
    def _keeps_up(self) -> bool:
        return self._frames.qsize() < _MAX_INBOX and self.side.qsize() < _MAX_SIDE_INBOX

    def _read(self) -> None:
        try:
            while self._keeps_up and os.getppid() == self._parent:
                if select.select([self._pipe], [], [], _PARENT_CHECK_S)[0]:
                    kind, body, _ = self._pipe.receive()
                    if kind is Frame.SIDE:
                        self.side.put(body)
                    else:
                        self._frames.put((kind, body))
        except PipeClosedError:
            pass
        # Not sys.exit: the main thread may be inside a collective that never returns.
        os._exit(_EXIT_ORPHANED)


class _Channel:
    """Implements SideChannel over the rank's one pipe."""

    def __init__(self, inbox: Inbox, pipe: RankPipe) -> None:
        self._inbox = inbox
        self._pipe = pipe

    def receive(self, timeout_s: float | None) -> bytes | None:
        """See SideChannel."""
        try:
            return self._inbox.side.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def interrupt(self) -> None:
        """See SideChannel."""
        self._inbox.side.put(None)

    def send(self, message: bytes) -> None:
        """See SideChannel."""
        self._pipe.send(Frame.SIDE, message)

    def fail(self, error: Exception) -> None:
        """See SideChannel."""
        self._pipe.send(Frame.FAILED, failure_to(error))


def run_rank(fd: int, start_side: StartSide | None = None) -> int:
    """Serve rank 0 at the other end of `fd`; returns the process's exit status.

    Args:
        fd: of a socket to rank 0.
        start_side: starts what runs beside the executor.
    """
    # Ctrl-C reaches the whole process group; rank 0 decides when ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = RankPipe(socket.socket(fileno=fd))
    inbox = Inbox(pipe)
    try:
        kind, body = inbox.next(_START_TIMEOUT_S)
        assert kind is Frame.START
        config, rank, meeting = read_start(body)
        pipe.rank = rank
        executor, group = _build(config, rank, meeting)
        side = None
        if start_side is not None:
            side = start_side(rank, executor.pool, _Channel(inbox, pipe))
        pipe.send(Frame.READY)
        _serve(executor, inbox, RankCopies(executor.pool.host_memory, config.rank_timeout_s))
        if side is not None:
            side.close()
        executor.close()
        group.close()
    except Exception as error:
        log.exception("rank ends")
        pipe.send(Frame.FAILED, failure_to(error))
        return 1
    return 0


def _build(config: EngineConfig, rank: int, meeting: Meeting) -> tuple[Executor, TorchGroup]:
    # Settings of another host come as they were given there: rank 0 has not seen its devices.
    config = replace(config, device=usable_device(config.device))
    group = TorchGroup(
        rank,
        config.tensor_parallel_size,
        rank_device(config, rank),
        meeting=meeting,
        timeout_s=config.start_timeout_s,
        check=lambda: None,
    )
    return build_rank(config, group), group


def _serve(executor: Executor, inbox: Inbox, copies: RankCopies) -> None:
    decoder = PlanDecoder()
    pending: deque[PendingStep] = deque()
    while True:
        try:
            kind, body = inbox.next(_IDLE_S if pending else None)
        except queue.Empty:
            pending.popleft().wait()
            continue
        if kind is Frame.CLOSE:
            break
        if kind in (Frame.COPY, Frame.COPIED):
            copies.obey(kind, body)
            continue
        assert kind is Frame.PLAN, kind
        pending.append(executor.submit(decoder.decode(body)))
        # As rank 0 does: the next step is under way before the one before it is waited for.
        while len(pending) > executor.overlaps:
            pending.popleft().wait()
    while pending:
        pending.popleft().wait()


def pipe_fd(argv: list[str]) -> int:
    """The descriptor that rank 0 passed on the command line."""
    if len(argv) != 2 or not argv[1].isdigit():
        sys.exit("This module is started by rank 0; set tensor_parallel_size instead.")
    return int(argv[1])


if __name__ == "__main__":
    sys.exit(run_rank(pipe_fd(sys.argv)))
