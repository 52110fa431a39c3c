"""Entry of the process of one rank above 0: builds its share, then takes steps until told to end.

Started by rank 0 with one end of a pipe as an inherited descriptor. A thread of its own reads the
pipe, so that this process ends with rank 0 even while it is caught in a collective.
"""

import json
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections import deque

from engine.build import build_rank
from engine.config import EngineConfig
from engine.executor import Executor, PendingStep
from engine.parallel.pipe import Frame, PipeClosedError, RankPipe, failure_to
from engine.parallel.plan_codec import PlanDecoder
from engine.parallel.shares import rank_device
from engine.parallel.torch_group import TorchGroup

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_IDLE_S = 0.1
"""How long a step that runs ahead is left alone before its end is waited for."""
_MAX_INBOX = 64
"""Rank 0 is at most two steps ahead; more frames than this mean that it has gone astray."""
_PARENT_CHECK_S = 2.0
_EXIT_ORPHANED = 3


class Inbox:
    """Frames from rank 0, read by a thread that ends the process when rank 0 is gone."""

    def __init__(self, pipe: RankPipe) -> None:
        self._pipe = pipe
        # A fork of rank 0 would keep the pipe open, so its end is not the only sign.
        self._parent = os.getppid()
        self._frames: queue.SimpleQueue[tuple[Frame, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="leash", daemon=True).start()

    def next(self, timeout_s: float | None = None) -> tuple[Frame, bytes]:
        """The next frame, waited for until rank 0 is gone; queue.Empty after `timeout_s`."""
        return self._frames.get(timeout=timeout_s)

    def _read(self) -> None:
        try:
            while self._frames.qsize() < _MAX_INBOX and os.getppid() == self._parent:
                if select.select([self._pipe], [], [], _PARENT_CHECK_S)[0]:
                    self._frames.put(self._pipe.receive())
        except PipeClosedError:
            pass
        # Not sys.exit: the main thread may be inside a collective that never returns.
        os._exit(_EXIT_ORPHANED)


def run_rank(fd: int) -> int:
    """Serve rank 0 at the other end of `fd`; returns the process's exit status."""
    # Ctrl-C reaches the whole process group; rank 0 decides when ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = RankPipe(socket.socket(fileno=fd))
    inbox = Inbox(pipe)
    try:
        kind, body = inbox.next(_START_TIMEOUT_S)
        assert kind is Frame.START
        executor, group = _build(json.loads(body))
        pipe.send(Frame.READY)
        _serve(executor, inbox)
        executor.close()
        group.close()
    except Exception as error:
        log.exception("rank ends")
        pipe.send(Frame.FAILED, failure_to(error))
        return 1
    return 0


def _build(start: dict[str, object]) -> tuple[Executor, TorchGroup]:
    fields, rank, store_fd = start["config"], start["rank"], start["store_fd"]
    assert isinstance(fields, dict) and isinstance(rank, int) and isinstance(store_fd, int)
    config = EngineConfig(**fields)
    group = TorchGroup(
        rank,
        config.tensor_parallel_size,
        rank_device(config, rank),
        store_fd=store_fd,
        timeout_s=config.start_timeout_s,
        check=lambda: None,
    )
    return build_rank(config, group), group


def _serve(executor: Executor, inbox: Inbox) -> None:
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
        assert kind is Frame.PLAN, kind
        pending.append(executor.submit(decoder.decode(body)))
        # As rank 0 does: the next step is under way before the one before it is waited for.
        while len(pending) > executor.overlaps:
            pending.popleft().wait()
    while pending:
        pending.popleft().wait()


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("This module is started by rank 0; set tensor_parallel_size instead.")
    sys.exit(run_rank(int(sys.argv[1])))
