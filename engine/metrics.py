"""Prometheus metrics of one engine, declared once on the registry that its process owns.

`Engine` reports each step; whoever renders the registry first passes it a snapshot of the load.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from engine.request import EngineStats, HostTierStats, StepOutputs
from telemetry.metrics import STEP_BUCKETS_S

STEP_TOKENS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens computed in one step."""
STEP_KINDS = ("prefill", "decode", "mixed")


class EngineMetrics:
    """What an operator sees of an engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stats = EngineStats()
        self._requests_waiting = Gauge(
            "diptych_requests_waiting", "Requests that wait for admission.", registry=registry
        )
        self._requests_running = Gauge(
            "diptych_requests_running", "Requests in the running batch.", registry=registry
        )
        self._backlog_tokens = Gauge(
            "diptych_backlog_tokens", "Tokens accepted and not yet computed.", registry=registry
        )
        self._kv_blocks = Gauge(
            "diptych_kv_blocks", "KV blocks by state.", ["state"], registry=registry
        )
        self._kv_cache_usage_ratio = Gauge(
            "diptych_kv_cache_usage_ratio", "Share of KV blocks that are held.", registry=registry
        )
        self._prefill_rate = Gauge(
            "diptych_prefill_tokens_per_second",
            "Measured rate of prefill, 0 until known.",
            registry=registry,
        )
        self._prefill_backlog = Gauge(
            "diptych_prefill_backlog_seconds",
            "Tokens accepted and not yet computed, at the measured rate; 0 until that is known.",
            registry=registry,
        )
        self._decode_step = Gauge(
            "diptych_decode_step_seconds",
            "Measured time of a step that only decodes, 0 until known.",
            registry=registry,
        )
        self._max_num_seqs = Gauge(
            "diptych_max_num_seqs", "Most sequences in the running batch.", registry=registry
        )
        self._batch_usage_ratio = Gauge(
            "diptych_batch_usage_ratio",
            "Share of the places in the running batch that are taken.",
            registry=registry,
        )
        self._batch_places = 1
        self._preemptions = Counter(
            "diptych_preemptions_total",
            "Sequences that lost their blocks to an older one.",
            registry=registry,
        )
        self._lookup_tokens = Counter(
            "diptych_prefix_cache_lookup_tokens_total",
            "Prompt tokens looked up in the prefix cache.",
            registry=registry,
        )
        self._hit_tokens = Counter(
            "diptych_prefix_cache_hit_tokens_total",
            "Prompt tokens served from the prefix cache.",
            registry=registry,
        )
        self._tier_blocks = Gauge(
            "diptych_kv_tier_blocks",
            "KV blocks of a tier below the device, by state.",
            ["tier", "state"],
            registry=registry,
        )
        self._tier_hit_tokens = Counter(
            "diptych_kv_tier_hit_tokens_total",
            "Tokens whose KV a tier below the device gave back; the prefix cache served them next.",
            ["tier"],
            registry=registry,
        )
        self._tier_bytes = Counter(
            "diptych_kv_tier_bytes_total",
            "Bytes of KV copied into a tier below the device, and out of it again.",
            ["tier", "direction"],
            registry=registry,
        )
        self._tier_lost_blocks = Counter(
            "diptych_kv_tier_lost_blocks_total",
            "KV blocks evicted from the device before the tier below had a copy.",
            ["tier"],
            registry=registry,
        )
        self._tier_rate = Gauge(
            "diptych_kv_tier_bytes_per_second",
            "Measured rate of copies between the device and a tier below, 0 until known.",
            ["tier"],
            registry=registry,
        )
        self._cache_config = Info(
            "diptych_cache_config", "Tokens per KV block and blocks in the pool.", registry=registry
        )
        self._step_duration = Histogram(
            "diptych_step_duration_seconds",
            "Wall time of one engine step; kind is prefill, decode, or mixed where both share it.",
            ["kind"],
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self._durations = {kind: self._step_duration.labels(kind) for kind in STEP_KINDS}
        self._step_tokens = Histogram(
            "diptych_step_tokens",
            "Tokens computed in one engine step, by phase.",
            ["phase"],
            buckets=STEP_TOKENS_BUCKETS,
            registry=registry,
        )
        self._prefill_tokens = self._step_tokens.labels("prefill")
        self._decode_tokens = self._step_tokens.labels("decode")

    def describe_cache(self, *, block_size: int, num_blocks: int) -> None:
        """Say once how large the KV pool is; gateways turn block counts into tokens by it."""
        self._cache_config.info({"block_size": str(block_size), "num_blocks": str(num_blocks)})

    def describe_batch(self, *, max_num_seqs: int) -> None:
        """Say once how many sequences run at once."""
        self._batch_places = max(1, max_num_seqs)
        self._max_num_seqs.set(max_num_seqs)

    def observe_step(self, outputs: StepOutputs) -> None:
        """Take one step into account."""
        self._durations[_kind(outputs)].observe(outputs.duration_s)
        if outputs.num_prefill_tokens:
            self._prefill_tokens.observe(outputs.num_prefill_tokens)
        if outputs.num_decode_tokens:
            self._decode_tokens.observe(outputs.num_decode_tokens)

    def observe_stats(self, stats: EngineStats) -> None:
        """Bring gauges and counters up to a snapshot taken later than the last one."""
        past, self._stats = self._stats, stats
        self._requests_waiting.set(stats.waiting)
        self._requests_running.set(stats.running)
        self._backlog_tokens.set(stats.backlog_tokens)
        self._kv_blocks.labels("free").set(stats.free_blocks)
        self._kv_blocks.labels("cached").set(stats.cached_blocks)
        self._kv_blocks.labels("held").set(stats.held_blocks)
        self._kv_cache_usage_ratio.set(stats.held_blocks / max(1, stats.total_blocks))
        rate = stats.prefill_tokens_per_s
        self._prefill_rate.set(rate)
        self._prefill_backlog.set(stats.backlog_tokens / rate if rate else 0.0)
        self._decode_step.set(stats.decode_step_s)
        self._batch_usage_ratio.set(stats.running / self._batch_places)
        self._preemptions.inc(stats.preemptions - past.preemptions)
        self._lookup_tokens.inc(stats.lookup_tokens - past.lookup_tokens)
        self._hit_tokens.inc(stats.cached_tokens - past.cached_tokens)
        if stats.host.total_blocks:
            self._observe_host_tier(stats.host, past.host)

    def _observe_host_tier(self, now: HostTierStats, past: HostTierStats) -> None:
        self._tier_blocks.labels("host", "free").set(now.free_blocks)
        self._tier_blocks.labels("host", "cached").set(now.cached_blocks)
        self._tier_blocks.labels("host", "held").set(now.held_blocks)
        self._tier_hit_tokens.labels("host").inc(now.hit_tokens - past.hit_tokens)
        self._tier_bytes.labels("host", "in").inc(now.saved_bytes - past.saved_bytes)
        self._tier_bytes.labels("host", "out").inc(now.loaded_bytes - past.loaded_bytes)
        self._tier_lost_blocks.labels("host").inc(now.lost_blocks - past.lost_blocks)
        self._tier_rate.labels("host").set(now.bytes_per_s)


def _kind(outputs: StepOutputs) -> str:
    if not outputs.num_prefill_tokens:
        return "decode"
    return "mixed" if outputs.num_decode_tokens else "prefill"
