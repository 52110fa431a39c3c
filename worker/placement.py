"""The leader's side of having Ray place and start its other nodes (worker/ray_driver.py).

Nothing but where nodes run and who starts them is Ray's business: they join the leader as those do
that were started by hand. Invariant: what Ray placed ends with `close`, and with this process.
"""

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress

from core.clock import monotonic
from worker.engine_child import settings_values
from worker.exit_status import EXIT_FAILED, EXIT_NODE_LOST
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

DRIVER_MODULE = "worker.ray_driver"
_ROOM_SHARE = 0.9
"""Of the time to start: the engine gives up at the end of it, and knows less of the reason."""
_ANSWER_SHARE = 0.95
_CLOSE_S = 8.0
_ENDED = "The process that talks with Ray ended unasked: see whether Ray still runs on this host."


class PlacementError(Exception):
    """Ray did not place the other nodes, or lost one; `status` is the process's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RayPlacement:
    """The process that talks with Ray, and what it reports."""

    def __init__(self, process: asyncio.subprocess.Process, answer_by: float, address: str) -> None:
        """Use `start`."""
        self._process = process
        self._address = address
        self._answer_by = answer_by
        self._placed = False
        self._failed: asyncio.Future[PlacementError] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, settings: WorkerSettings, role: str) -> "RayPlacement":
        """Ask for the other nodes; settings are the leader's, its port among them."""
        began = monotonic()
        own = settings.own_host
        host = f"[{own}]" if ":" in own and not own.startswith("[") else own
        order = {
            "role": role,
            "folder": os.getcwd(),
            "deadline": began + _ROOM_SHARE * settings.start_timeout_s,
            "leader_address": f"{host}:{settings.port}",
            "own_host": own,
            "loopback": settings.loopback,
            "values": settings_values(settings),
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", DRIVER_MODULE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        answer_by = began + _ANSWER_SHARE * settings.start_timeout_s
        return cls(process, answer_by, settings.ray_address)

    async def watch(self) -> None:
        """Until Ray can't place the nodes, or has lost one.

        Raises:
            PlacementError: says which and why.
        """
        await asyncio.wait({self._failed}, timeout=self._answer_by - monotonic())
        if not self._placed and not self._failed.done():
            raise PlacementError(f"Ray at {self._address} did not answer.", EXIT_NODE_LOST)
        raise await asyncio.shield(self._failed)

    async def close(self) -> None:
        """Let nodes that were told to end do so, then give back what Ray gave. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._placed:  # Ray takes back what a driver had when that is gone
            with suppress(ProcessLookupError):
                self._process.kill()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            report = json.loads(line)
            if "placed" in report:
                places = ", ".join(f"node {rank} on {at}" for rank, at in report["placed"].items())
                log.info("Ray placed %s", places)
                self._placed = True
            elif "refused" in report:
                self._fail(PlacementError(report["refused"], report["status"]))
            else:
                if report["log"]:
                    log.error("%s Its last lines:\n%s", report["lost"], report["log"])
                self._fail(PlacementError(report["lost"], EXIT_NODE_LOST))
        self._fail(PlacementError(_ENDED, EXIT_FAILED))

    def _fail(self, error: PlacementError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)
