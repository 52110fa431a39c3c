"""Alerts: when a person should look, and the page that says what to do then.

Each one has a runbook in docs/runbooks under its name, and a test in which it fires and one in
which it does not. `critical` means that clients notice now; `warning`, that they will.
"""

from dataclasses import dataclass
from typing import Literal

from scripts.dashboards.promql import Source, Vector
from scripts.dashboards.recording import RELEASE
from scripts.dashboards.registry import Catalogue

OBJECTIVE = 0.99
"""Share of sequences that shall meet their targets, over a month."""
FAST_BURN, SLOW_BURN = 14.4, 6.0
"""How many times faster than allowed misses come.

Source: Google, The Site Reliability Workbook, ch. 5: 2% of a month's budget in an hour, 5% in six.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert. Texts may hold Prometheus's template expressions."""

    name: str
    severity: Literal["critical", "warning"]
    vector: Vector
    hold: str
    """How long it must be so."""
    summary: str
    description: str


def alerts(catalogue: Catalogue) -> list[Alert]:
    """Every alert, over metrics of the catalogue, recorded ones included."""
    source = Source(catalogue, "5m")
    return [*_for_clients(source), *_for_fleet(source), *_for_transfer(source), *_for_load(source)]


def _for_clients(source: Source) -> list[Alert]:
    return [
        Alert(
            name="DiptychErrorRatioHigh",
            severity="critical",
            vector=source.now("diptych:request_errors:ratio_rate5m") > 0.05,
            hold="5m",
            summary="{{ $value | humanizePercentage }} of requests fail.",
            description="More than 5% of requests end with an error that is not their client's.",
        ),
        *(
            Alert(
                name=name,
                severity=severity,
                vector=_burning(source, short, long, factor),
                hold=hold,
                summary="{{ $value | humanizePercentage }} of sequences miss their targets.",
                description=f"Over {long} and {short}, misses come {factor:g} times as fast as "
                f"an objective of {OBJECTIVE:.0%} allows.",
            )
            for name, severity, short, long, factor, hold in _BURNS
        ),
        *(
            Alert(
                name=name,
                severity="warning",
                vector=source.now(f"diptych:{target}_seconds:p99_5m")
                > source.now("diptych_router_slo_target_seconds", target=target).max(*RELEASE),
                hold="10m",
                summary=f"{what} is {{{{ $value | humanizeDuration }}}} at the 99th percentile.",
                description="That is above its target (diptych_router_slo_target_seconds).",
            )
            for name, target, what in (
                ("DiptychTimeToFirstTokenHigh", "ttft", "The time to first token"),
                ("DiptychTimePerOutputTokenHigh", "tpot", "The time per output token"),
                ("DiptychInterTokenLatencyHigh", "itl", "The gap between tokens"),
            )
        ),
        Alert(
            name="DiptychRequestsShed",
            severity="warning",
            vector=source.rate("diptych_router_shed_total").sum(*RELEASE) > 0,
            hold="5m",
            summary="{{ $value | humanize }} requests per second are refused with 429.",
            description="The router's queue is full, or requests could not be served in time.",
        ),
        Alert(
            name="DiptychRequestsWaitForWorkers",
            severity="critical",
            vector=source.now("diptych_router_generations_waiting").sum(*RELEASE) > 0,
            hold="1m",
            summary="{{ $value }} requests wait for any worker that could take them.",
            description="They are admitted, but no ready worker fits; they fail after "
            "--no-worker-grace-s.",
        ),
        Alert(
            name="DiptychTimeUnexplained",
            severity="warning",
            vector=source.now("diptych:unattributed:ratio_rate5m") > 0.05,
            hold="15m",
            summary="{{ $value | humanizePercentage }} of the time of requests has no cause.",
            description="Workers end requests without saying how long each stage took.",
        ),
    ]


def _for_fleet(source: Source) -> list[Alert]:
    pools = (*RELEASE, "role")
    ready = source.now("diptych_router_workers", state="ready").max(*pools)
    known = source.now("diptych_router_workers").max(*pools, "state").sum(*pools)
    return [
        Alert(
            name="DiptychAbsent",
            severity="critical",
            vector=_absent(source.now("diptych_build_info", component="router")),
            hold="5m",
            summary="No router is scraped.",
            description="Either none runs, or Prometheus does not reach any.",
        ),
        Alert(
            name="DiptychNoWorkerReady",
            severity="critical",
            vector=ready.sum(*RELEASE).equals(0),
            hold="1m",
            summary="No worker takes requests.",
            description="Routers see neither a prefill nor a decode worker that is ready.",
        ),
        Alert(
            name="DiptychPoolEmpty",
            severity="warning",
            vector=ready.equals(0).where(known > 0, *pools),
            hold="2m",
            summary="No {{ $labels.role }} worker is ready.",
            description="The other pool serves alone, slower; no KV is handed over.",
        ),
        Alert(
            name="DiptychWorkersLost",
            severity="warning",
            vector=source.now("diptych_router_workers", state="=~lost|stalled").max(*pools, "state")
            > 0,
            hold="5m",
            summary="{{ $value }} {{ $labels.role }} workers are {{ $labels.state }}.",
            description="Routers are told of them, and can't reach them or see them stand still.",
        ),
        Alert(
            name="DiptychDiscoveryStale",
            severity="warning",
            vector=source.now("diptych_discovery_last_sync_age_seconds").max(*RELEASE, "pod") > 300,
            hold="1m",
            summary="A router has not heard of changes for {{ $value | humanizeDuration }}.",
            description="Kubernetes' API server does not tell it which workers there are. It keeps "
            "those that it knows; new ones it does not see.",
        ),
        Alert(
            name="DiptychEngineStalled",
            severity="critical",
            # Engine metrics show that it was built: while it loads its model it has no heartbeat.
            vector=source.now("diptych_engine_heartbeat_age_seconds").where(
                source.now("diptych_kv_cache_usage_ratio"), *RELEASE, "worker", "instance"
            )
            > 15,
            hold="1m",
            summary="The engine of {{ $labels.worker }} has not turned for "
            "{{ $value | humanizeDuration }}.",
            description="It hangs in a step; what it computes for clients stands still.",
        ),
        Alert(
            name="DiptychWorkerNotReady",
            severity="warning",
            vector=source.now("diptych_worker_ready").equals(0),
            hold="15m",
            summary="{{ $labels.worker }} has not been ready for a quarter of an hour.",
            description="It is still loading, draining without end, or stalled.",
        ),
        Alert(
            name="DiptychWorkerRestarts",
            severity="warning",
            vector=source.over("30m")
            .changes("diptych_worker_process_start_time_seconds")
            .sum(*RELEASE, "role", "pool", "worker")
            > 2,
            hold="0m",
            summary="{{ $labels.worker }} started {{ $value }} times in half an hour.",
            description="Each restart loses its cache and repeats what it was computing.",
        ),
    ]


def _for_transfer(source: Source) -> list[Alert]:
    links = source.now("diptych_kv_link_bytes_per_second")
    pair = (*RELEASE, "worker", "peer")
    return [
        Alert(
            name="DiptychTransferFailures",
            severity="warning",
            vector=source.now("diptych:kv_transfer_failed:ratio_rate5m") > 0.01,
            hold="5m",
            summary="{{ $value | humanizePercentage }} of hand-overs fail.",
            description="Their prompts are computed again, so clients see it as latency.",
        ),
        Alert(
            name="DiptychLeasesExpired",
            severity="warning",
            vector=source.over("15m")
            .increase("diptych_kv_export_oddities_total", kind="=~expired_lease|overdue_lease")
            .sum(*RELEASE, "worker")
            > 0,
            hold="0m",
            summary="Leases on {{ $labels.worker }} ended without a release.",
            description="Decode workers vanish, or can't reach it; its blocks were held meanwhile.",
        ),
        Alert(
            name="DiptychLinkSlow",
            severity="warning",
            vector=(
                links.max(*pair).over_one(links.max(*pair).median(*RELEASE), *RELEASE) < 0.25
            ).where(links.max(*pair).count(*RELEASE) > 2, *RELEASE),
            hold="10m",
            summary="KV comes from {{ $labels.peer }} to {{ $labels.worker }} at "
            "{{ $value | humanizePercentage }} of the usual speed.",
            description="Its transport has probably fallen back to a slower path.",
        ),
        Alert(
            name="DiptychLinkFailing",
            severity="warning",
            vector=source.now("diptych_kv_link_failing").max(*pair) > 0,
            hold="5m",
            summary="No KV comes from {{ $labels.peer }} to {{ $labels.worker }}.",
            description="Test blocks arrive wrong or not at all; nothing is handed over there.",
        ),
        Alert(
            name="DiptychTransportMixed",
            severity="warning",
            vector=source.now("diptych_kv_link_bytes_per_second", transport="tcp")
            .max(*pair)
            .where(
                source.now("diptych_kv_link_bytes_per_second", transport="!=tcp").max(*RELEASE),
                *RELEASE,
            )
            > 0,
            hold="10m",
            summary="KV comes from {{ $labels.peer }} to {{ $labels.worker }} by tcp.",
            description="Other pairs of the same release use a faster transport.",
        ),
        Alert(
            name="DiptychPrefillUnused",
            severity="warning",
            vector=source.now("diptych:disaggregated:ratio_rate5m")
            .equals(0)
            .where(
                source.now("diptych_router_workers", role="prefill", state="ready").max(*RELEASE)
                > 0,
                *RELEASE,
            ),
            hold="10m",
            summary="No request is handed over, though prefill workers are ready.",
            description="Every prompt is computed on a decode worker.",
        ),
    ]


def _for_load(source: Source) -> list[Alert]:
    return [
        Alert(
            name="DiptychPrefillBacklogHigh",
            severity="warning",
            vector=source.now("diptych_router_backlog_seconds").max(*RELEASE) > 5,
            hold="10m",
            summary="Every prefill worker is {{ $value | humanizeDuration }} of work behind.",
            description="Prompts wait that long before they are computed: the pool is too small.",
        ),
        Alert(
            name="DiptychKvCacheFull",
            severity="warning",
            vector=source.now("diptych:kv_usage:ratio", role="decode") > 0.95,
            hold="5m",
            summary="{{ $value | humanizePercentage }} of the KV blocks of decode are held.",
            description="Requests wait for room or lose theirs to older ones: the pool is too "
            "small.",
        ),
        Alert(
            name="DiptychPreemptions",
            severity="warning",
            vector=source.rate("diptych_preemptions_total").sum(*RELEASE, "role", "pool") > 0.05,
            hold="10m",
            summary="{{ $value | humanize }} sequences per second lose their KV blocks.",
            description="What they had computed is computed again.",
        ),
        Alert(
            name="DiptychCacheIndexLosesEvents",
            severity="warning",
            vector=source.rate("diptych_router_resyncs_total").sum(*RELEASE) > 0.05,
            hold="10m",
            summary="Routers ask {{ $value | humanize }} times per second for a cache snapshot.",
            description="Cache events of workers are lost; placement works with stale knowledge.",
        ),
        Alert(
            name="DiptychRouterBusy",
            severity="warning",
            vector=source.rate("diptych_router_process_cpu_seconds_total").max(*RELEASE) > 0.85,
            hold="10m",
            summary="A router uses {{ $value | humanizePercentage }} of its one core.",
            description="Its event loop delays every token that passes through it.",
        ),
    ]


_BURNS: tuple[tuple[str, Literal["critical", "warning"], str, str, float, str], ...] = (
    ("DiptychSloBurnsFast", "critical", "5m", "1h", FAST_BURN, "2m"),
    ("DiptychSloBurnsSlowly", "warning", "30m", "6h", SLOW_BURN, "15m"),
)


def _burning(source: Source, short: str, long: str, factor: float) -> Vector:
    least = factor * (1 - OBJECTIVE)

    def over(window: str) -> Vector:
        return source.now(f"diptych:slo_missed:ratio_rate{window}", target="all") > least

    return over(long).where(over(short), *RELEASE)


def _absent(vector: Vector) -> Vector:
    return Vector(f"absent({vector.text})", frozenset(), vector.families)
