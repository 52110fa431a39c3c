"""Starts a worker's engine process and ends it: the child at the other end of the pipe."""

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress
from typing import Any, Protocol

from engine.threads import available_cores, compute_thread_env
from kvtransfer.mooncake_engine import mooncake_environment
from kvtransfer.nixl_agent import ucx_environment
from rpc.v1 import ipc_pb2
from worker.ipc import ServicePipe, open_pipe
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_EXIT_S = 10.0


def settings_values(settings: WorkerSettings) -> dict[str, Any]:
    """Everything, secrets included: for pipes to processes of this worker and nowhere else."""
    values = settings.model_dump(mode="json")
    if settings.auth_token is not None:
        values["auth_token"] = settings.auth_token.get_secret_value()
    return values


def settings_json(settings: WorkerSettings) -> bytes:
    """`settings_values` as the engine process reads them."""
    return json.dumps(settings_values(settings)).encode()


class EngineFailedError(Exception):
    """The engine process could not start, or ended unasked."""

    def __init__(self, message: str, *, waited: bool = False) -> None:
        """Args: waited is true if it was other ranks that it waited for in vain."""
        super().__init__(message)
        self.waited = waited


class InheritedNodes(Protocol):
    """What an engine whose ranks lie on several nodes is given of the others."""

    @property
    def message(self) -> ipc_pb2.OtherNodes:
        """What is what."""
        ...

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that it inherits under their numbers."""
        ...

    def close(self) -> None:
        """Close them here."""
        ...


def rank_environment(settings: WorkerSettings, num_threads: int) -> dict[str, str]:
    """Of a process that holds a rank and computes with that many threads."""
    return {
        **os.environ,
        **compute_thread_env(num_threads),
        **ucx_environment(os.environ, loopback=settings.loopback),
        **mooncake_environment(os.environ),
    }


class EngineChild:
    """The child and the pipe to it."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: ServicePipe) -> None:
        self._process = process
        self.pipe = pipe

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    @classmethod
    async def start(
        cls, settings: WorkerSettings, module: str, nodes: InheritedNodes | None = None
    ) -> "EngineChild":
        """Start `python -m module` and tell it what to build."""
        ours, theirs = open_pipe()
        inherited = nodes.fds if nodes else ()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(), *inherited),
            stdin=asyncio.subprocess.DEVNULL,
            env=rank_environment(settings, settings.num_threads or available_cores()),
        )
        theirs.close()
        if nodes:
            nodes.close()
        pipe = await ServicePipe.open(ours)
        start = ipc_pb2.Start(
            settings_json=settings_json(settings), nodes=nodes.message if nodes else None
        )
        pipe.send(ipc_pb2.EngineCommand(start=start))
        return cls(process, pipe)

    def stop(self) -> None:
        """Ask it to end. It hands back what it has, and closes the pipe when it has said so."""
        with suppress(ConnectionError):
            self.pipe.send(ipc_pb2.EngineCommand(stop=ipc_pb2.Stop()))

    def abandon(self) -> None:
        """End it wherever it is: right only before it serves, when it has nothing to hand back.

        It does not read its pipe while it starts. Ranks that it has begun to start end with it.
        """
        with suppress(ProcessLookupError):
            self._process.terminate()

    async def end(self) -> None:
        """Ask, wait, then kill. Idempotent."""
        if self._process.returncode is not None:
            return
        self.stop()
        self.pipe.close()
        try:
            async with asyncio.timeout(_EXIT_S):
                await self._process.wait()
        except TimeoutError:
            log.warning("the engine did not end within %.0f s: killing it", _EXIT_S)
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
