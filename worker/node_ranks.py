"""The ranks of a node that does not lead: starts their processes, joins their pipes into one.

Lives in that node's service process; rank 0's frames come from the leader and go to every rank
alike, theirs are handed on whole. Invariant: no rank outlives `kill`, nor this process, whose end
of their pipes is their leash.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

from core.modelfile.resolve import resolve_model
from engine.parallel.meeting import Meeting, start_message
from engine.parallel.pipe import HEADER_BYTES, Frame, PipeClosedError, frame, read_header
from engine.threads import available_cores, rank_threads
from worker.engine_child import rank_environment
from worker.settings import WorkerSettings, engine_config

log = logging.getLogger(__name__)

RANK_MODULE = "worker.rank"
_TAKE_S = 30.0
"""Longest that a rank may leave rank 0's frames unread."""


class FollowerRanks:
    """Processes of the ranks of this node."""

    def __init__(self, ranks: range, take: Callable[[bytes], Awaitable[None]]) -> None:
        """Use `start`."""
        self._ranks = ranks
        self._take = take
        self._processes: list[asyncio.subprocess.Process] = []
        self._streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._ready: set[int] = set()
        self.ready = asyncio.Event()
        """Set once every rank can take steps."""

    @classmethod
    async def start(
        cls, settings: WorkerSettings, meeting: Meeting, take: Callable[[bytes], Awaitable[None]]
    ) -> "FollowerRanks":
        """Start a process for each rank of this node and tell it what to build.

        Args:
            settings: of the worker.
            meeting: where all ranks meet.
            take: given each frame of a rank, whole.
        """
        config = engine_config(settings)
        config = replace(config, model=str(resolve_model(config.model)))
        here = config.ranks_per_node
        first = settings.node_rank * here
        self = cls(range(first, first + here), take)
        env = rank_environment(settings, rank_threads(config) or available_cores())
        for rank in self._ranks:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", RANK_MODULE, str(theirs.fileno()), settings.own_host),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    env=env,
                )
            self._processes.append(process)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            writer.write(frame(Frame.START, start_message(config, rank, meeting)))
            self._streams.append((reader, writer))
        return self

    async def send(self, data: bytes) -> None:
        """Give every rank the next bytes of rank 0's frames.

        Raises:
            OSError: a rank does not take them; TimeoutError is one.
        """
        for _, writer in self._streams:
            writer.write(data)
        async with asyncio.timeout(_TAKE_S):
            for _, writer in self._streams:
                await writer.drain()

    async def run(self) -> str:
        """Hand on what ranks say until they end; which one failed and how, empty if none did."""
        tasks = [asyncio.create_task(self._listen(rank)) for rank in self._ranks]
        try:
            for ended in asyncio.as_completed(tasks):
                reason = await ended
                if reason:
                    return reason
            return ""
        finally:
            for task in tasks:
                task.cancel()

    async def kill(self) -> None:
        """End every rank now. Idempotent."""
        for process, (_, writer) in zip(self._processes, self._streams, strict=True):
            writer.close()
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _listen(self, rank: int) -> str:
        index = rank - self._ranks.start
        reader, _ = self._streams[index]
        try:
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                kind, _, length = read_header(header)
                await self._take(header + await reader.readexactly(length))
                if kind is Frame.READY:
                    self._ready.add(rank)
                    if len(self._ready) == len(self._ranks):
                        self.ready.set()
        except (asyncio.IncompleteReadError, OSError, PipeClosedError):
            code = await self._processes[index].wait()
        if code < 0:
            return f"rank {rank} was ended by signal {signal.Signals(-code).name}"
        return f"rank {rank} ended with status {code}" if code else ""
