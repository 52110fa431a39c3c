"""Prometheus metrics of a decode worker's hand-overs."""

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from telemetry.metrics import TRANSFER_BUCKETS_S


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
        self._oddities = Counter(
            "diptych_kv_handover_oddities_total",
            "Messages and ends out of the ordinary that were ignored or refused, by kind.",
            ["kind"],
            registry=registry,
        )
        self._transport = transport
        self._seen: Tally[str] = Tally()

    def delivered(self, transfer_s: float, num_bytes: int) -> None:
        """One prompt's KV is here."""
        self._transfer_s.observe(transfer_s)
        self._bytes.inc(num_bytes)

    def failed(self, reason: str) -> None:
        """One hand-over ended without its KV."""
        self._failures.labels(self._transport, reason).inc()

    def observe(self, inflight: int, counters: Tally[str]) -> None:
        """Follow the state machine's own numbers."""
        self._inflight.set(inflight)
        for kind, count in (counters - self._seen).items():
            self._oddities.labels(kind).inc(count)
        self._seen = Tally(counters)
