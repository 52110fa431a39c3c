"""Discovery through Kubernetes: the watch's thread here, the fleet's event loop there.

Only the newest set of workers waits between them: one that the loop has not taken yet is replaced,
so what is handed over is bounded and the thread never waits.
"""

import asyncio
import logging
import threading
from collections.abc import Mapping

from core.clock import Clock
from router.fleet.discovery import Member, Members, tell_changes
from router.fleet.kubernetes.api import SliceApi
from router.fleet.kubernetes.metrics import DiscoveryMetrics
from router.fleet.kubernetes.slices import Census
from router.fleet.kubernetes.watch import SYNCING, SliceWatch, WatchTimes

log = logging.getLogger(__name__)

STOP_S = 2.0
"""Time that the thread has to end. It may be connecting; then it is left behind, a daemon."""


class KubernetesDiscovery:
    """See the module. Implements fleet.discovery.Discovery."""

    def __init__(
        self,
        api: SliceApi,
        metrics: DiscoveryMetrics,
        clock: Clock,
        times: WatchTimes | None = None,
    ) -> None:
        self._api = api
        self._metrics = metrics
        self._clock = clock
        self._times = times or WatchTimes()
        self._watch: SliceWatch | None = None
        self._latest: Mapping[str, Member] = {}

    async def run(self, members: Members) -> None:
        """Tell of what the slices list until cancelled."""
        loop = asyncio.get_running_loop()
        fresh = asyncio.Event()

        def publish(found: Census) -> None:
            self._latest = found.members
            loop.call_soon_threadsafe(fresh.set)

        watch = SliceWatch(self._api, publish, self._metrics, self._clock, self._times)
        self._watch = watch
        thread = threading.Thread(target=watch.run, name="discovery", daemon=True)
        log.info("looking for workers in %s", self._api)
        thread.start()
        known: Mapping[str, Member] = {}
        try:
            while True:
                await fresh.wait()
                fresh.clear()
                latest = self._latest
                tell_changes(known, latest, members)
                known = latest
        finally:
            watch.stop()
            await asyncio.to_thread(thread.join, STOP_S)

    @property
    def shortage(self) -> str:
        """See Discovery."""
        trouble = self._watch.trouble if self._watch is not None else SYNCING
        return trouble or f"Kubernetes lists none: {self._api}."
