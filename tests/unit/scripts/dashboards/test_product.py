"""What is committed is what the registry determines, and fits together."""

import re
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from decode.settings import DecodeSettings
from prefill.settings import PrefillSettings
from router.settings import RouterSettings
from scripts.dashboards.board import PAGE_WIDTH, Board
from scripts.dashboards.product import CHART, Product

ROOT = Path(__file__).resolve().parents[4]
METRIC = re.compile(r"\b(?:diptych_[a-z_]+|diptych:[a-z_]+:[a-z0-9_]+)\b")
NOT_SHOWN = {
    "diptych_cache_config_info": "for gateways, which turn block counts into tokens by it",
    "diptych_discovery_connected": "the age of the API server's last word says what comes of it",
    "diptych_discovery_events_total": "how often Kubernetes speaks; what it says is on a panel",
    "diptych_engine_process_max_fds": "said by the limit of routers; engines open few files",
    "diptych_engine_process_open_fds": "the same",
    "diptych_engine_process_start_time_seconds": "that of the service process says the same",
    "diptych_engine_process_virtual_memory_bytes": "says nothing",
    "diptych_router_process_start_time_seconds": "routers hold nothing that a restart loses",
    "diptych_router_process_virtual_memory_bytes": "says nothing",
    "diptych_worker_process_max_fds": "as of engines",
    "diptych_worker_process_open_fds": "as of engines",
    "diptych_worker_process_resident_memory_bytes": "small and constant",
    "diptych_worker_process_virtual_memory_bytes": "says nothing",
    "python_gc_objects_collected_total": "how often is what delays; how many is not",
    "python_gc_objects_uncollectable_total": "the same",
    "diptych_autoscale_last_turn_seconds": "signals that are gone from their panel say the same",
    "diptych_autoscale_replicas": "sizes are on a panel",
    "diptych_batch_usage_ratio": "for autoscalers; sequences per worker are on a panel",
    "diptych_decode_step_seconds": "for plans; the histogram of steps is on a panel",
    "diptych_max_num_seqs": "for plans",
    "diptych_prefill_backlog_seconds": "for autoscalers; a rule records the same, with more care",
    "diptych_router_pool_backlog_seconds": "for autoscalers without a Prometheus",
    "diptych_router_pool_batch_usage_ratio": "the same",
    "diptych_router_pool_cache_hit_ratio": "the same",
    "diptych_router_pool_kv_usage_ratio": "the same",
    "diptych_router_pool_prefill_tokens_per_second": "the same",
    "diptych_router_predicted_wait_seconds": "for autoscalers; waits are on a panel",
}
"""Metrics on no dashboard and in no alert, and why."""


@cache
def product() -> Product:
    return Product()


def test_committed_files_are_those_of_the_registry() -> None:
    files = product().files()
    stale = [
        str(path)
        for path, content in files.items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text() != content
    ]
    committed = {path.relative_to(ROOT) for path in (ROOT / CHART / "dashboards").glob("*")}
    extra = [str(path) for path in committed - {Path(path) for path in files}]
    assert not stale + extra, "run make dashboards, and delete what it no longer writes"


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    alerts = {alert.name for alert in product().alerts}
    assert {path.stem for path in (ROOT / "docs/runbooks").glob("*.md")} == alerts
    for board in product().boards:
        for panel in board.panels:
            assert set(panel.runbooks) <= alerts, panel.title


@pytest.mark.parametrize("name", sorted(alert.name for alert in Product().alerts))
def test_a_runbook_says_what_it_means_how_to_confirm_it_and_how_to_mend_it(name: str) -> None:
    text = (ROOT / f"docs/runbooks/{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    for part in ("## What it means", "## Confirm", "```promql", "## Mend"):
        assert part in text, f"{name}: {part}"


def test_documents_name_no_metric_that_is_not_there() -> None:
    known = set()
    for family in product().catalogue.families.values():
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ()
        known |= {family.name, *(family.name + suffix for suffix in suffixes)}
    known.add("diptych_busy_share")  # what the example of a metrics adapter calls its answer
    documents = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    unknown = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in documents
        for name in METRIC.findall(path.read_text())
        if name not in known and not any(each.startswith(name) for each in known)
    }
    assert not unknown


def test_every_metric_is_looked_at_somewhere_or_it_is_said_why_not() -> None:
    built = product()
    asked = {name for rule in built.recordings for name in rule.vector.families}
    asked |= {name for alert in built.alerts for name in alert.vector.families}
    for board in built.boards:
        for panel in board.panels:
            asked |= {name for query in panel.queries for name in query.vector.families}
    own = {family.name for family in built.catalogue.own}
    unseen = own - asked
    assert not unseen - set(NOT_SHOWN), "give it a panel in scripts/dashboards/boards, or a reason"
    assert not set(NOT_SHOWN) - unseen, "it is shown, or gone: strike it from NOT_SHOWN"


@pytest.mark.parametrize("board", Product().boards, ids=lambda board: board.name)
def test_a_dashboard_is_one_that_grafana_can_show(board: Board) -> None:
    shown = board.json()
    panels: list[dict[str, Any]] = shown["panels"]
    assert shown["uid"] == f"diptych-{board.name}" and len(shown["uid"]) <= 40
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} <= {
        "row", "timeseries", "stat", "table", "heatmap",
    }  # fmt: skip
    titles = [panel["title"] for panel in panels if panel["type"] != "row"]
    assert len(set(titles)) == len(titles)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= PAGE_WIDTH
        if panel["type"] != "row":
            assert len(panel["description"]) > 10, panel["title"]
            assert panel["targets"]


def test_dashboards_have_uids_of_their_own_and_link_to_each_other() -> None:
    shown = [board.json() for board in product().boards]
    assert len({one["uid"] for one in shown}) == len(shown)
    assert all(one["links"][0]["tags"][0] in one["tags"] for one in shown)


def test_routers_have_no_pool_or_worker_to_choose() -> None:
    for board in product().boards:
        names = {variable["name"] for variable in board.json()["templating"]["list"]}
        assert {"datasource", "namespace", "release"} <= names
        used = {
            name
            for panel in board.panels
            for query in panel.queries
            for name in re.findall(r"\$(\w+)", query.vector.text)
            if not name.startswith("__")
        }
        assert used <= names, board.name


def test_runbooks_name_no_setting_that_is_not_there() -> None:
    fields = {
        name
        for settings in (RouterSettings, PrefillSettings, DecodeSettings)
        for name in settings.model_fields
    }
    for path in (*(ROOT / "docs/runbooks").glob("*.md"), ROOT / "docs/observability.md"):
        for flag in re.findall(r"`--([a-z][a-z0-9-]+)", path.read_text()):
            assert flag.replace("-", "_") in fields, f"{path.name}: --{flag}"
