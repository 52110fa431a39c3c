"""Every metric that some process of Diptych declares, as Prometheus will know it once scraped.

The processes' own constructors are called on registries of their own, so nothing is listed twice
and nothing can be forgotten here. What other exporters show is in `external`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from core.clock import monotonic
from decode.metrics import ImportMetrics
from diptych.autoscale.loop import Metrics as AutoscaleMetrics
from engine.metrics import EngineMetrics
from engine.request import EngineStats, HostTierStats
from prefill.metrics import ExportMetrics
from router.api.metrics import ApiMetrics
from router.api.slo import SloTargets
from router.fleet.kubernetes.metrics import DiscoveryMetrics
from router.main import router_registry
from router.metrics import FleetMetrics
from router.scaling import show_scaling_signals
from router.timeline import RequestTimeline
from scripts.dashboards.external import EXTERNAL
from scripts.dashboards.family import Family, UnknownMetricError
from telemetry.metrics import ProcessRegistry
from worker.node_metrics import show_joined, show_silence
from worker.process_metrics import process_registry
from worker.service import EngineView

SCRAPED = frozenset({"namespace", "release", "pod", "instance", "job"})
"""Labels that a scrape adds; the chart's monitors add all of them, a static scrape some."""
SCRAPED_WORKER = SCRAPED | {"pool", "role", "worker"}
"""Of workers: role and worker are their own, pool comes with the scrape."""
ENDPOINTS = ("chat", "completions", "responses", "generate")
_OPEN_LABELS = frozenset({"worker", "peer", "transport", "api"}) | {
    *("component", "version", "python", "block_size", "num_blocks", "generation")
}
"""Labels whose values are not known here, or are no fixed set."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Families by name of the family, which is what the exposition's TYPE line names."""

    families: Mapping[str, Family] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Family:
        try:
            return self.families[name]
        except KeyError:
            raise UnknownMetricError(
                f"No process declares the metric {name!r}, and external.py lists none of that name."
            ) from None

    @property
    def own(self) -> list[Family]:
        """What Diptych itself declares, by name."""
        return sorted(
            (family for family in self.families.values() if not family.exporter),
            key=lambda family: family.name,
        )


def build_catalogue() -> Catalogue:
    """Declare everything once and look at it."""
    found: dict[str, Family] = {}
    for process, declare in _PROCESSES.items():
        registry = declare()
        for collector in list(registry._collector_to_names):
            declared = getattr(collector, "_labelnames", ())
            for metric in collector.collect():
                family = _family(metric, declared, process)
                before = found.get(family.name)
                found[family.name] = family if before is None else before.joined(family)
    return Catalogue(found | {family.name: family for family in EXTERNAL})


def _family(metric: Metric, declared: tuple[str, ...], process: str) -> Family:
    values: dict[str, set[str]] = {name: set() for name in declared}
    for sample in metric.samples:
        for name, value in sample.labels.items():
            if name != "le":
                values.setdefault(name, set()).add(value)
    scraped = SCRAPED if process in ("router", "autoscaler") else SCRAPED_WORKER
    return Family(
        name=metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, ""),
        kind=metric.type,
        meaning=metric.documentation,
        values={
            name: frozenset(() if name in _OPEN_LABELS else known) for name, known in values.items()
        },
        scraped=scraped,
        processes=(process,),
    )


class _NoFleet:
    """A fleet and its requests, of which there are none."""

    statuses = ()
    predicted_wait_s = 0.0

    def recent(self, count: int) -> list[RequestTimeline]:
        return []


def _router() -> CollectorRegistry:
    registry = router_registry()
    FleetMetrics(registry).watch_workers(list)
    DiscoveryMetrics(registry, monotonic)
    show_scaling_signals(registry, _NoFleet(), _NoFleet(), assumed_tokens_per_s=1.0)
    api = ApiMetrics(registry, SloTargets())
    for endpoint in ENDPOINTS:
        api.of(endpoint)
    return registry


def _service() -> CollectorRegistry:
    view = EngineView(stall_after_s=1.0, clock=lambda: 0.0)
    registry = process_registry(
        role="prefill",
        view=view,
        num_streams=lambda: 0,
        engine_pid=os.getpid(),
    )
    show_joined(registry, lambda: 0)
    show_silence(registry, {1: lambda: 0.0})
    return registry


def _prefill() -> CollectorRegistry:
    registry = _engine("prefill")
    ExportMetrics(registry)
    return registry


def _decode() -> CollectorRegistry:
    registry = _engine("decode")
    ImportMetrics(registry, "")
    return registry


def _engine(role: str) -> CollectorRegistry:
    registry = ProcessRegistry()
    metrics = EngineMetrics(registry)
    metrics.describe_cache(block_size=1, num_blocks=1)
    metrics.describe_batch(max_num_seqs=1)
    metrics.observe_stats(EngineStats(total_blocks=1, host=HostTierStats(total_blocks=1)))
    return registry


def _autoscaler() -> CollectorRegistry:
    registry = CollectorRegistry()
    AutoscaleMetrics(registry)
    return registry


_PROCESSES: Mapping[str, Callable[[], CollectorRegistry]] = {
    "router": _router,
    "worker": _service,
    "prefill": _prefill,
    "decode": _decode,
    "autoscaler": _autoscaler,
}
