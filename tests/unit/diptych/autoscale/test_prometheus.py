"""Answers of Prometheus: fresh ones become signals, others do not; queries name what there is."""

import re

import pytest
from prometheus_client import CollectorRegistry

from decode.metrics import ImportMetrics
from diptych.autoscale.prometheus import queries, signals_of
from diptych.autoscale.signals import Targets
from engine.metrics import EngineMetrics
from prefill.metrics import ExportMetrics
from router.api.metrics import ApiMetrics
from router.api.slo import SloTargets
from router.metrics import FleetMetrics

TARGETS = Targets(backlog_s=0.5, busy=0.7, kv=0.75, batch=0.8, itl_s=0.05)
VALUES: dict[str, float | None] = {
    "age": 12.0, "prefill ready": 3, "prefill seen": 3, "decode ready": 2, "decode seen": 2,
    "backlog": 1.0, "busy": 0.35, "kv": 0.6, "batch": 0.2, "itl": 0.02,
}  # fmt: skip


def test_fresh_answers_become_signals() -> None:
    signals = signals_of(VALUES, TARGETS)
    assert signals is not None
    assert signals.prefill.shares == {"busy share": 0.5}
    assert signals.prefill.strains == {"backlog": 2.0}
    assert signals.decode.shares == pytest.approx({"KV occupancy": 0.8, "batch occupancy": 0.25})
    assert signals.decode.strains == pytest.approx({"ITL": 0.4})
    assert (signals.prefill.ready, signals.decode.ready) == (3, 2)
    assert signals.prefill.complete
    assert signals.decode.complete


def test_old_answers_and_missing_workers_are_seen() -> None:
    for change in ({"age": 61.0}, {"age": None}, {"decode ready": None}):
        assert signals_of({**VALUES, **change}, TARGETS) is None
    part = signals_of({**VALUES, "prefill seen": 2, "kv": None, "itl": None}, TARGETS)
    assert part is not None
    assert not part.prefill.complete
    assert part.decode.complete
    assert part.decode.shares["KV occupancy"] is None
    assert part.decode.strains == {"ITL": None}


def test_queries_name_metrics_that_exist_and_keep_others_out() -> None:
    registry = CollectorRegistry()
    EngineMetrics(registry), ApiMetrics(registry, SloTargets()), FleetMetrics(registry)
    ImportMetrics(registry, "tcp"), ExportMetrics(registry)
    known = {name for names in registry._collector_to_names.values() for name in names}
    for query in queries('namespace="llm"').values():
        metrics = re.findall(r"(diptych_\w+)(\{[^}]*\})?", query)
        assert metrics
        for name, labels in metrics:
            assert name in known, query
            assert 'namespace="llm"' in labels, query
