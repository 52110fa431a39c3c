from prometheus_client import CollectorRegistry

from engine.engine import Engine
from engine.metrics import EngineMetrics
from engine.request import EngineStats, HostTierStats, StepOutputs
from tests.support.engine import make_config, make_request, run
from tests.support.fake_executor import DIGEST, FakeExecutor


def test_stats_show_as_gauges_and_counters() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.observe_stats(
        EngineStats(waiting=2, running=3, total_blocks=8, free_blocks=2, held_blocks=4,
                    cached_blocks=2, preemptions=5, cached_tokens=16, lookup_tokens=20)
    )  # fmt: skip
    metrics.observe_stats(
        EngineStats(
            total_blocks=8, free_blocks=8, preemptions=6, cached_tokens=16, lookup_tokens=30
        )
    )
    value = registry.get_sample_value
    assert value("diptych_requests_running") == 0
    assert value("diptych_kv_blocks", {"state": "free"}) == 8
    assert value("diptych_kv_cache_usage_ratio") == 0
    assert value("diptych_preemptions_total") == 6
    assert value("diptych_prefix_cache_hit_tokens_total") == 16
    assert value("diptych_prefix_cache_lookup_tokens_total") == 30


def test_the_host_tier_shows_by_its_name() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    value = registry.get_sample_value
    metrics.observe_stats(EngineStats(total_blocks=8))
    assert value("diptych_kv_tier_blocks", {"tier": "host", "state": "free"}) is None
    for times in (1, 2):
        host = HostTierStats(
            total_blocks=9, free_blocks=4, cached_blocks=3, held_blocks=2, hit_tokens=16 * times,
            lost_blocks=5 * times, saved_bytes=100 * times, loaded_bytes=10 * times,
            bytes_per_s=1e9,
        )  # fmt: skip
        metrics.observe_stats(EngineStats(total_blocks=8, host=host))
    states = ("free", "cached", "held")
    named = [{"tier": "host", "state": state} for state in states]
    assert [value("diptych_kv_tier_blocks", labels) for labels in named] == [4, 3, 2]
    assert value("diptych_kv_tier_hit_tokens_total", {"tier": "host"}) == 32
    assert value("diptych_kv_tier_lost_blocks_total", {"tier": "host"}) == 10
    assert value("diptych_kv_tier_bytes_total", {"tier": "host", "direction": "in"}) == 200
    assert value("diptych_kv_tier_bytes_total", {"tier": "host", "direction": "out"}) == 20
    assert value("diptych_kv_tier_bytes_per_second", {"tier": "host"}) == 1e9


def test_steps_show_as_histograms_by_phase() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.observe_step(StepOutputs([], 30, 2, 0.25))
    metrics.observe_step(StepOutputs([], 0, 2, 0.25))
    value = registry.get_sample_value
    assert value("diptych_step_duration_seconds_sum", {"kind": "mixed"}) == 0.25
    assert value("diptych_step_duration_seconds_sum", {"kind": "decode"}) == 0.25
    assert value("diptych_step_duration_seconds_count", {"kind": "prefill"}) == 0
    assert value("diptych_step_tokens_count", {"phase": "prefill"}) == 1
    assert value("diptych_step_tokens_sum", {"phase": "decode"}) == 4


def test_engine_reports_its_steps() -> None:
    registry = CollectorRegistry()
    engine = Engine(
        make_config(), FakeExecutor(), model_digest=DIGEST, metrics=EngineMetrics(registry)
    )
    engine.add(make_request("r", 6, max_tokens=3))
    run(engine)
    count = "diptych_step_duration_seconds_count"
    assert registry.get_sample_value(count, {"kind": "prefill"}) == 1
    assert registry.get_sample_value(count, {"kind": "decode"}) == 2
    assert registry.get_sample_value("diptych_step_tokens_sum", {"phase": "prefill"}) == 6


def test_two_engines_do_not_share_metrics() -> None:
    EngineMetrics(CollectorRegistry())
    EngineMetrics(CollectorRegistry())


def test_signals_for_autoscalers_are_in_seconds_and_shares() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    value = registry.get_sample_value
    metrics.describe_batch(max_num_seqs=8)
    metrics.observe_stats(EngineStats(backlog_tokens=500))
    assert value("diptych_prefill_backlog_seconds") == 0, "no rate is known yet"
    metrics.observe_stats(
        EngineStats(running=6, backlog_tokens=500, prefill_tokens_per_s=250.0, decode_step_s=0.02)
    )
    assert value("diptych_prefill_backlog_seconds") == 2
    assert value("diptych_batch_usage_ratio") == 0.75
    assert value("diptych_decode_step_seconds") == 0.02
    assert value("diptych_max_num_seqs") == 8
