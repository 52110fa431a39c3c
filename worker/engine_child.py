"""Starts a worker's engine process and ends it: the child at the other end of the pipe."""

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress

from engine.threads import available_cores, compute_thread_env
from kvtransfer.mooncake_engine import mooncake_environment
from kvtransfer.nixl import ucx_environment
from rpc.v1 import ipc_pb2
from worker.ipc import ServicePipe, open_pipe
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_EXIT_S = 10.0


def settings_json(settings: WorkerSettings) -> bytes:
    """Everything, secrets included: for the engine process's pipe and nowhere else."""
    values = settings.model_dump(mode="json")
    if settings.auth_token is not None:
        values["auth_token"] = settings.auth_token.get_secret_value()
    return json.dumps(values).encode()


class EngineChild:
    """The child and the pipe to it."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: ServicePipe) -> None:
        self._process = process
        self.pipe = pipe

    @classmethod
    async def start(cls, settings: WorkerSettings, module: str) -> "EngineChild":
        """Start `python -m module` and tell it what to build."""
        ours, theirs = open_pipe()
        env = {
            **os.environ,
            **compute_thread_env(settings.num_threads or available_cores()),
            **ucx_environment(os.environ, loopback=settings.loopback),
            **mooncake_environment(os.environ),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            env=env,
        )
        theirs.close()
        pipe = await ServicePipe.open(ours)
        start = ipc_pb2.Start(settings_json=settings_json(settings))
        pipe.send(ipc_pb2.EngineCommand(start=start))
        return cls(process, pipe)

    def stop(self) -> None:
        """Ask it to end. It hands back what it has, and closes the pipe when it has said so."""
        with suppress(ConnectionError):
            self.pipe.send(ipc_pb2.EngineCommand(stop=ipc_pb2.Stop()))

    async def end(self) -> None:
        """Ask, wait, then kill."""
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
