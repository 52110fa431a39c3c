"""What tells a worker's service process to stop, and what to hurry."""

import asyncio
from typing import Any


class StopRequests:
    """Who may tell a worker to stop: signals to this process, and its other nodes."""

    def __init__(self, signals: "asyncio.Queue[int]", stopping: asyncio.Event | None) -> None:
        """Args: stopping is set when another node was told to end; None: there is none."""
        self._signals = signals
        self._stopping = stopping
        self._signalled = False

    async def wait(self) -> None:
        """Until told to stop."""
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(self._signals.get())]
        if self._stopping is not None:
            waits.append(asyncio.create_task(self._stopping.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            self._signalled = waits[0].done()
        finally:
            for wait in waits:
                wait.cancel()

    async def again(self) -> None:
        """Until a second signal. Kubernetes sends the first one to all nodes at about once."""
        if not self._signalled:
            await self._signals.get()
        await self._signals.get()
