"""Metrics of discovery through Kubernetes. Declared once, observed by the watch's thread."""

from collections import Counter as Tally
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from core.clock import Clock
from router.fleet.discovery import Member
from router.fleet.kubernetes.slices import Ignored
from router.fleet.worker import Role


class DiscoveryMetrics:
    """One per router process; labels are bounded."""

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        self._clock = clock
        self._synced_at = clock()
        age = Gauge(
            "diptych_discovery_last_sync_age_seconds",
            "Time since the API server last confirmed the set of workers; until it does so "
            "first, since the start.",
            registry=registry,
        )
        age.set_function(lambda: self._clock() - self._synced_at)
        self.connected = Gauge(
            "diptych_discovery_connected", "1 while a watch is open.", registry=registry
        )
        self.requests = Counter(
            "diptych_discovery_requests_total",
            "Requests to the API server, by verb and outcome.",
            ["verb", "outcome"],
            registry=registry,
        )
        self.events = Counter(
            "diptych_discovery_events_total",
            "Events of watches, by type.",
            ["type"],
            registry=registry,
        )
        self._members = Gauge(
            "diptych_discovery_members",
            "Workers that EndpointSlices list, by pool's role and whether they are to end.",
            ["role", "state"],
            registry=registry,
        )
        self._ignored = Gauge(
            "diptych_discovery_ignored_endpoints",
            "Endpoints of selected EndpointSlices that are no workers, by reason.",
            ["reason"],
            registry=registry,
        )
        self.count({}, {})

    def synced(self) -> None:
        """The API server has just confirmed what is known."""
        self._synced_at = self._clock()

    def count(self, members: Mapping[str, Member], ignored: Mapping[Ignored, int]) -> None:
        """Show how many endpoints there are of each kind."""
        tally = Tally((each.role, each.draining) for each in members.values())
        for role in Role:
            self._members.labels(role.value, "listed").set(tally[role, False])
            self._members.labels(role.value, "draining").set(tally[role, True])
        for reason in Ignored:
            self._ignored.labels(reason.value).set(ignored.get(reason, 0))
