"""Prometheus metrics of a prefill worker's leases."""

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge

from telemetry.metrics import start_at_zero

ODDITIES = (
    *("duplicate_claim", "duplicate_submit", "expired_claim", "expired_lease", "late_commit"),
    *("late_progress", "late_release", "late_renew", "message_on_closed_link", "overdue_lease"),
    *("refused_claim", "refused_hello", "refused_probe"),
)
"""Kinds that `kvtransfer.export` counts."""


class ExportMetrics:
    """What an operator sees of KV leased out."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._leases = Gauge(
            "diptych_kv_leases", "Prompts whose KV is leased out, or will be.", registry=registry
        )
        self._leased_blocks = Gauge(
            "diptych_kv_leased_blocks", "KV blocks held by leases.", registry=registry
        )
        self._commits = Counter(
            "diptych_kv_commits_total", "Prompts completed for a decode worker.", registry=registry
        )
        self._oddities = Counter(
            "diptych_kv_export_oddities_total",
            "Messages and ends out of the ordinary, expired leases among them, by kind.",
            ["kind"],
            registry=registry,
        )
        self._seen: Tally[str] = Tally()
        start_at_zero(self._oddities, ODDITIES)

    def committed(self) -> None:
        """One prompt is complete."""
        self._commits.inc()

    def observe(self, leases: int, blocks: int, counters: Tally[str]) -> None:
        """Follow the state machine's own numbers."""
        self._leases.set(leases)
        self._leased_blocks.set(blocks)
        for kind, count in (counters - self._seen).items():
            self._oddities.labels(kind).inc(count)
        self._seen = Tally(counters)
