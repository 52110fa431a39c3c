"""Each alert fires on what it is for, and on nothing else, as promtool evaluates the rules."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from scripts.dashboards.product import RULES, Product
from tests.support.prometheus import tools_or_skip

ROOT = Path(__file__).resolve().parents[2]
SHOP = 'namespace="demo",release="shop"'

Series = Mapping[str, str]
"""Selector to values, one for each step, in promtool's notation: 0+5x20 counts 5 a step."""


@dataclass(frozen=True)
class Case:
    """An alert, series on which it fires, and some on which it does not."""

    alert: str
    fires: Series
    quiet: Series
    after_min: int = 20
    step_min: int = 1
    """Between two samples, and two evaluations."""


def router(name: str, labels: str = "") -> str:
    return f'{name}{{{SHOP},instance="r0"{"," if labels else ""}{labels}}}'


def worker(name: str, labels: str = "", *, role: str = "decode", one: str = "d0") -> str:
    own = f'{SHOP},pool="{role}",role="{role}",worker="{one}",instance="{one}"'
    return f"{name}{{{own}{',' if labels else ''}{labels}}}"


def requests(outcome: str) -> str:
    return router("diptych_router_requests_total", f'api="chat",outcome="{outcome}"')


def judged(outcome: str) -> str:
    return router("diptych_router_slo_sequences_total", f'target="all",outcome="{outcome}"')


def workers(role: str, state: str) -> str:
    return router("diptych_router_workers", f'role="{role}",state="{state}"')


def link(peer: str, one: str = "d0", transport: str = "nixl") -> str:
    labels = f'peer="{peer}",transport="{transport}"'
    return worker("diptych_kv_link_bytes_per_second", labels, one=one)


def latency(name: str, target: str, *, slow: str, fast: str) -> Series:
    """`slow` above 2 s, `fast` below 0.5 s; the target is 1 s."""
    metric = f"diptych_router_{name}_seconds_bucket"
    return {
        router(metric, 'api="chat",le="0.5"'): fast,
        router(metric, 'api="chat",le="2"'): fast,
        router(metric, 'api="chat",le="+Inf"'): slow,
        router("diptych_router_slo_target_seconds", f'target="{target}"'): "1x40",
    }


ROUTING = "diptych_router_routing_total"
EXPIRED = worker("diptych_kv_export_oddities_total", 'kind="expired_lease"', role="prefill")
LATE = worker("diptych_kv_export_oddities_total", 'kind="late_release"', role="prefill")
FAILED = worker("diptych_kv_transfer_failures_total", 'reason="worker_lost",transport="nixl"')
MOVED = worker("diptych_kv_transfer_duration_seconds_count", 'transport="nixl"')
TESTED = worker("diptych_kv_link_failing", 'peer="p0",transport="nixl"')
HELD, FREE = (worker("diptych_kv_blocks", f'state="{state}"') for state in ("held", "free"))
SYNCED = router("diptych_discovery_last_sync_age_seconds")
BEAT = worker("diptych_engine_heartbeat_age_seconds")
BUILT = worker("diptych_kv_cache_usage_ratio")
READY = worker("diptych_worker_ready")
STARTED = worker("diptych_worker_process_start_time_seconds")
UNKNOWN = router("diptych_router_unattributed_seconds_total")
STAGES = router("diptych_router_stage_seconds_sum", 'stage="decode"')
MODES = {mode: router(ROUTING, f'mode="{mode}"') for mode in ("disaggregated", "local")}

CASES = [
    Case(
        "DiptychErrorRatioHigh",
        {requests("ok"): "0+90x40", requests("internal"): "0+10x40"},
        {requests("ok"): "0+90x40", requests("invalid_request"): "0+90x40",
         requests("internal"): "0+1x40"},
    ),
    Case(
        "DiptychSloBurnsFast",
        {judged("met"): "0+80x40", judged("missed"): "0+20x40"},
        {judged("met"): "0+95x40", judged("missed"): "0+5x40"},
    ),
    Case(
        "DiptychSloBurnsSlowly",
        {judged("met"): "0+90x40", judged("missed"): "0+10x40"},
        {judged("met"): "0+99x40", judged("missed"): "0+1x40"},
        after_min=390,
        step_min=10,
    ),
    Case(
        "DiptychTimeToFirstTokenHigh",
        latency("time_to_first_token", "ttft", slow="0+100x40", fast="0+90x40"),
        latency("time_to_first_token", "ttft", slow="0+100x40", fast="0+100x40"),
    ),
    Case(
        "DiptychTimePerOutputTokenHigh",
        latency("time_per_output_token", "tpot", slow="0+100x40", fast="0+90x40"),
        latency("time_per_output_token", "tpot", slow="0+100x40", fast="0+100x40"),
    ),
    Case(
        "DiptychInterTokenLatencyHigh",
        latency("inter_token_latency", "itl", slow="0+100x40", fast="0+90x40"),
        latency("inter_token_latency", "itl", slow="0+100x40", fast="0+100x40"),
    ),
    Case(
        "DiptychRequestsShed",
        {router("diptych_router_shed_total", 'reason="refused"'): "0+1x40"},
        {router("diptych_router_shed_total", 'reason="refused"'): "5x40"},
    ),
    Case(
        "DiptychRequestsWaitForWorkers",
        {router("diptych_router_generations_waiting"): "3x40"},
        {router("diptych_router_generations_waiting"): "0 3 0 3 0 3 0 3 0x40"},
    ),
    Case(
        "DiptychTimeUnexplained",
        {UNKNOWN: "0+10x40", STAGES: "0+100x40"},
        {UNKNOWN: "0+1x40", STAGES: "0+100x40"},
    ),
    Case(
        "DiptychAbsent",
        {worker("diptych_build_info", 'component="decode"'): "1x40"},
        {router("diptych_build_info", 'component="router"'): "1x40"},
    ),
    Case(
        "DiptychNoWorkerReady",
        {workers("prefill", "ready"): "0x40", workers("decode", "ready"): "0x40"},
        {workers("prefill", "ready"): "0x40", workers("decode", "ready"): "1x40"},
    ),
    Case(
        "DiptychPoolEmpty",
        {workers("prefill", "ready"): "0x40", workers("prefill", "lost"): "2x40",
         workers("decode", "ready"): "2x40"},
        # No prefill pool is there at all, which is no fault.
        {workers("prefill", "ready"): "0x40", workers("prefill", "lost"): "0x40",
         workers("decode", "ready"): "2x40"},
    ),
    Case(
        "DiptychWorkersLost",
        {workers("decode", "stalled"): "1x40"},
        {workers("decode", "stalled"): "0 1 1 0x40", workers("decode", "draining"): "2x40"},
    ),
    Case("DiptychDiscoveryStale", {SYNCED: "0+60x40"}, {SYNCED: "0 30 60 0 30 60 0 30 60 0x30"}),
    Case(
        "DiptychEngineStalled",
        {BEAT: "10+60x40", BUILT: "0.5x40"},
        {BEAT: "10+60x40"},  # loading its model: no engine metrics yet
    ),
    Case("DiptychWorkerNotReady", {READY: "0x40"}, {READY: "0x10 1x30"}),
    Case("DiptychWorkerRestarts", {STARTED: "1 1 2 2 3 3 4 4x30"}, {STARTED: "1 1 1 2x40"}),
    Case(
        "DiptychTransferFailures",
        {FAILED: "0+5x40", MOVED: "0+95x40"},
        {FAILED: "0x40", MOVED: "0+95x40"},
    ),
    Case("DiptychLeasesExpired", {EXPIRED: "0x10 1x30"}, {EXPIRED: "1x40", LATE: "0+3x40"}),
    Case(
        "DiptychLinkSlow",
        {link("p0"): "20e9x40", link("p1"): "20e9x40", link("p2"): "1e9x40"},
        {link("p0"): "20e9x40", link("p1"): "20e9x40", link("p2"): "10e9x40"},
    ),
    Case("DiptychLinkFailing", {TESTED: "1x40"}, {TESTED: "0x8 1x3 0x30"}),
    Case(
        "DiptychTransportMixed",
        {link("p0"): "20e9x40", link("p1", transport="tcp"): "1e9x40"},
        {link("p0", transport="tcp"): "1e9x40", link("p1", transport="tcp"): "1e9x40"},
    ),
    Case(
        "DiptychPrefillUnused",
        {MODES["disaggregated"]: "0x40", MODES["local"]: "0+5x40",
         workers("prefill", "ready"): "2x40"},
        {MODES["disaggregated"]: "0x40", MODES["local"]: "0+5x40",
         workers("prefill", "ready"): "0x40"},
    ),
    Case(
        "DiptychPrefillBacklogHigh",
        {router("diptych_router_backlog_seconds"): "8x40"},
        {router("diptych_router_backlog_seconds"): "1x40"},
    ),
    Case("DiptychKvCacheFull", {HELD: "98x40", FREE: "2x40"}, {HELD: "80x40", FREE: "20x40"}),
    Case(
        "DiptychPreemptions",
        {worker("diptych_preemptions_total"): "0+10x40"},
        {worker("diptych_preemptions_total"): "0x10 2x30"},
    ),
    Case(
        "DiptychCacheIndexLosesEvents",
        {router("diptych_router_resyncs_total"): "0+10x40"},
        {router("diptych_router_resyncs_total"): "0x10 2x30"},
    ),
    Case(
        "DiptychRouterBusy",
        {router("diptych_router_process_cpu_seconds_total"): "0+58x40"},
        {router("diptych_router_process_cpu_seconds_total"): "0+30x40"},
    ),
]  # fmt: skip


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [tools_or_skip().promtool, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid() -> None:
    promtool("check", "rules", ROOT / RULES)


def test_every_alert_has_a_case() -> None:
    assert sorted(case.alert for case in CASES) == sorted(one.name for one in Product().alerts)


@pytest.mark.parametrize("step_min", sorted({case.step_min for case in CASES}))
def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path, step_min: int) -> None:
    tests = [
        _test(case, series, fires=fires)
        for case in CASES
        if case.step_min == step_min
        for series, fires in ((case.fires, True), (case.quiet, False))
    ]
    promtool("test", "rules", _written(tmp_path, tests, step_min))


@pytest.mark.parametrize("fires", [True, False])
def test_a_wrong_expectation_fails(tmp_path: Path, fires: bool) -> None:
    case = CASES[0]
    wrong = _test(case, case.quiet if fires else case.fires, fires=fires)
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", _written(tmp_path, [wrong]))


def _written(folder: Path, tests: list[dict[str, object]], step_min: int = 1) -> Path:
    path = folder / "alerts.yaml"
    interval, rules = f"{step_min}m", ROOT / RULES
    text = rules.read_text()
    suite = {
        "rule_files": [str(rules)],
        "evaluation_interval": interval,
        # Steps may be longer than Prometheus looks back: what is recorded must come first.
        "group_eval_order": [group["name"] for group in yaml.safe_load(text)["groups"]],
        "tests": tests,
    }
    path.write_text(json.dumps(suite))
    return path


def _test(case: Case, series: Series, *, fires: bool) -> dict[str, object]:
    """One test of promtool's, which looks at the series that Prometheus makes of alerts."""
    firing = f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"}})'
    samples = [{"labels": "{}", "value": 1}] if fires else []
    return {
        "name": f"{case.alert} {'fires' if fires else 'stays quiet'}",
        "interval": f"{case.step_min}m",
        "input_series": [
            {"series": selector, "values": values} for selector, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": f"{case.after_min}m",
                "exp_samples": samples,
            }
        ],
    }
