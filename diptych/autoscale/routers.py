"""Asks every router behind one name how full the pools are.

The name may be that of a headless Service: each address that it has is a router, and is asked for
itself, since counters of different routers must not be mixed.
"""

import asyncio
import logging
import socket
from urllib.parse import urlsplit

import httpx

from core.clock import Clock
from diptych.autoscale.signals import Reading, Signals, SignalWindow, read_router

log = logging.getLogger(__name__)


class RouterSource:
    """Signals from routers. Owned by the loop."""

    def __init__(
        self,
        url: str,
        window: SignalWindow,
        *,
        api_key: str | None,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        """Ask the routers that the host of `url` stands for."""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = urlsplit(url)
        self._window = window
        self._timeout_s = timeout_s
        self._clock = clock

    async def signals(self) -> Signals | None:
        """What the pools are like now; None if no router answers in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                addresses = await self._addresses()
        except (OSError, TimeoutError) as error:
            log.warning("no router is found as %s: %s", self._url.hostname, error)
            return None
        async with httpx.AsyncClient(timeout=self._timeout_s, trust_env=False) as client:
            found = await asyncio.gather(*(self._read(client, each) for each in addresses))
        readings = {
            address: reading
            for address, reading in zip(addresses, found, strict=True)
            if reading is not None
        }
        if not readings:
            return None
        self._window.add(readings)
        return self._window.signals(complete=len(readings) == len(addresses))

    async def _addresses(self) -> list[str]:
        """URLs of every router."""
        url = self._url
        port = url.port or (443 if url.scheme == "https" else 80)
        if url.scheme == "https":
            # The name is what the certificate is for; behind it is a load balancer or one router.
            return [f"https://{url.hostname}:{port}"]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
        hosts = sorted({str(each[4][0]) for each in found})
        if url.hostname == "localhost":
            hosts = ["127.0.0.1"]
        return [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts]

    async def _read(self, client: httpx.AsyncClient, address: str) -> Reading | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                metrics = await client.get(f"{address}/metrics", headers=self._headers)
            metrics.raise_for_status()
            return read_router(metrics.text, self._clock())
        except (httpx.HTTPError, TimeoutError, KeyError, ValueError) as error:
            log.warning("router %s does not say how full it is: %r", address, error)
            return None
