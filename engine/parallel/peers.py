"""The other ends of rank 0's pipes: a rank that it started itself, or the ranks of another node.

Owned by `children.py`. A child can be killed and says how it ended; of ranks elsewhere there is
nothing but their pipe, whose end whoever brought it takes for their end too.
"""

import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from engine.parallel.meeting import Meeting
from engine.parallel.pipe import PipeClosedError, RankPipe


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherNodes:
    """What rank 0 is given of ranks that others start, and where all of them meet."""

    pipes: Sequence[socket.socket]
    """To the ranks of each other node, by node from 1; see pipe.py for what they carry."""
    meeting: Meeting


class Peer(Protocol):
    """One or several ranks behind one pipe."""

    @property
    def ranks(self) -> range:
        """Their numbers."""
        ...

    @property
    def pipe(self) -> RankPipe:
        """To them."""
        ...

    @property
    def ready(self) -> set[int]:
        """Those that can take steps."""
        ...

    def name(self, rank: int) -> str:
        """What an operator calls one of them."""
        ...

    def how_it_ended(self, timeout_s: float) -> str:
        """A sentence on why the pipe was closed; waits at most that long to learn it."""
        ...

    def kill(self) -> None:
        """End them now, or as soon as they can be reached."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """True if they have ended within that time."""
        ...


@dataclass(slots=True, eq=False)
class LocalRank:
    """A child process."""

    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: RankPipe
    ready: set[int] = field(default_factory=set)

    @property
    def ranks(self) -> range:
        """See Peer."""
        return range(self.rank, self.rank + 1)

    def name(self, rank: int) -> str:
        """See Peer."""
        return f"Rank {rank}"

    def how_it_ended(self, timeout_s: float) -> str:
        """See Peer."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        name, code = f"Rank {self.rank} (pid {self.process.pid})", self.process.poll()
        if code is None:
            return f"{name} closed its pipe."
        if code < 0:
            return f"{name} was ended by signal {signal.Signals(-code).name}."
        return f"{name} ended with status {code}."

    def kill(self) -> None:
        """See Peer."""
        self.process.kill()

    def wait(self, timeout_s: float) -> bool:
        """See Peer."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


@dataclass(slots=True, eq=False)
class NodeRanks:
    """The ranks of another node."""

    node: int
    ranks: range
    sock: socket.socket
    pipe: RankPipe
    ready: set[int] = field(default_factory=set)

    def name(self, rank: int) -> str:
        """See Peer."""
        return f"Rank {rank} on node {self.node}"

    def how_it_ended(self, timeout_s: float) -> str:
        """See Peer."""
        return f"The ranks of node {self.node} closed their pipe."

    def kill(self) -> None:
        """See Peer. Whoever holds the other end hears of it."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout_s: float) -> bool:
        """See Peer."""
        deadline = time.monotonic() + timeout_s
        while select.select([self.sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                self.pipe.receive()
            except PipeClosedError:
                return True
        return False
