"""Prometheus metrics of a decode worker's hand-overs."""

from collections import Counter as Tally
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.errors import ErrorCode
from kvtransfer.actions import ProbeOutcome
from telemetry.metrics import TRANSFER_BUCKETS_S, start_at_zero

ODDITIES = (
    *("doubt", "duplicate_submit", "failed_read", "lapsed_lease", "late_message", "late_offer"),
    *("late_read", "late_renewed", "late_reserve", "late_revoke", "message_on_closed_link"),
    *("silent_peer", "stuck_read"),
)
"""Kinds that `kvtransfer.handover` counts."""


class ImportMetrics:
    """What an operator sees of KV coming in; `transport` is fixed for the process."""

    def __init__(self, registry: CollectorRegistry, transport: str) -> None:
        self._transfer_s = Histogram(
            "diptych_kv_transfer_duration_seconds",
            "Commit received to last KV block read, per prompt.",
            ["transport"],
            buckets=TRANSFER_BUCKETS_S,
            registry=registry,
        ).labels(transport)
        self._bytes = Counter(
            "diptych_kv_transfer_bytes_total",
            "Bytes of KV read from prefill workers.",
            ["transport"],
            registry=registry,
        ).labels(transport)
        self._failures = Counter(
            "diptych_kv_transfer_failures_total",
            "Hand-overs that failed, by cause.",
            ["transport", "reason"],
            registry=registry,
        )
        self._inflight = Gauge(
            "diptych_kv_transfers_inflight", "Hand-overs under way.", registry=registry
        )
        self._waiting = Gauge(
            "diptych_kv_transfers_waiting",
            "Prompts that wait for KV blocks to be read into.",
            registry=registry,
        )
        self._oddities = Counter(
            "diptych_kv_handover_oddities_total",
            "Messages and ends out of the ordinary that were ignored or refused, by kind.",
            ["kind"],
            registry=registry,
        )
        self._link_rate = Gauge(
            "diptych_kv_link_bytes_per_second",
            "Measured speed of READs from each linked prefill worker.",
            ["peer", "transport"],
            registry=registry,
        )
        self._link_latency = Gauge(
            "diptych_kv_link_latency_seconds",
            "Least time that a READ of one KV block took from each linked prefill worker.",
            ["peer", "transport"],
            registry=registry,
        )
        self._link_read_bytes = Counter(
            "diptych_kv_link_read_bytes_total",
            "Bytes of KV that READs from each linked prefill worker brought, probes included.",
            ["peer", "transport"],
            registry=registry,
        )
        self._link_read_s = Counter(
            "diptych_kv_link_read_seconds_total",
            "Time that those READs took, added up; several may run at once.",
            ["peer", "transport"],
            registry=registry,
        )
        self._link_failing = Gauge(
            "diptych_kv_link_failing",
            "1 if a test block did not come from this prefill worker as it was sent, else 0.",
            ["peer", "transport"],
            registry=registry,
        )
        self._probes = Counter(
            "diptych_kv_link_probes_total",
            "Tests of new links and measurements of unused ones, by outcome.",
            ["transport", "outcome"],
            registry=registry,
        )
        self.transport = transport
        self._seen: Tally[str] = Tally()
        start_at_zero(self._failures, [transport], ErrorCode)
        start_at_zero(self._oddities, ODDITIES)
        start_at_zero(self._probes, [transport], ProbeOutcome)

    def delivered(self, transfer_s: float, num_bytes: int) -> None:
        """One prompt's KV is here."""
        self._transfer_s.observe(transfer_s)
        self._bytes.inc(num_bytes)

    def failed(self, reason: str) -> None:
        """One hand-over ended without its KV."""
        self._failures.labels(self.transport, reason).inc()

    def link_measured(self, worker_id: str, bytes_per_s: float, latency_s: float) -> None:
        """What the link to a prefill worker can do; `latency_s` is 0 until measured."""
        self._link_rate.labels(worker_id, self.transport).set(bytes_per_s)
        if latency_s:
            self._link_latency.labels(worker_id, self.transport).set(latency_s)

    def link_read(self, worker_id: str, num_bytes: int, duration_s: float) -> None:
        """One READ from a prefill worker is done."""
        self._link_read_bytes.labels(worker_id, self.transport).inc(num_bytes)
        self._link_read_s.labels(worker_id, self.transport).inc(duration_s)

    def link_closed(self, worker_id: str) -> None:
        """No link to that worker is up: its series go."""
        series: tuple[Gauge | Counter, ...] = (
            *(self._link_rate, self._link_latency),
            *(self._link_read_bytes, self._link_read_s, self._link_failing),
        )
        for each in series:
            with suppress(KeyError):
                each.remove(worker_id, self.transport)

    def link_tested(self, worker_id: str, failing: bool) -> None:
        """A test block came from a prefill worker as it was sent, or did not."""
        self._link_failing.labels(worker_id, self.transport).set(failing)

    def probe_ended(self, outcome: str) -> None:
        """One measurement is over."""
        self._probes.labels(self.transport, outcome).inc()

    def observe(self, inflight: int, waiting: int, counters: Tally[str]) -> None:
        """Follow the state machine's own numbers, and how many prompts have no blocks yet."""
        self._inflight.set(inflight)
        self._waiting.set(waiting)
        for kind, count in (counters - self._seen).items():
            self._oddities.labels(kind).inc(count)
        self._seen = Tally(counters)
