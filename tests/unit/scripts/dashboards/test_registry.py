"""The catalogue holds all that is declared, under names that Prometheus leaves alone."""

import re
from pathlib import Path

from scripts.dashboards.registry import build_catalogue

ROOT = Path(__file__).resolve().parents[4]
PACKAGES = ("telemetry", "engine", "kvtransfer", "worker", "prefill", "decode", "router")
DECLARED = re.compile(r'(?:Counter|Gauge|Histogram|Info)\(\s*"(diptych_\w+)"')
TAKEN_BY_MONITORS = {
    *("namespace", "pod", "container", "endpoint", "service", "job", "instance"),
    *("release", "pool", "prometheus", "cluster"),
}
"""Labels that scrapes add; a metric's own of that name would be renamed to exported_..."""


def test_every_metric_that_some_module_declares_is_in_the_catalogue() -> None:
    declared = {
        name
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in DECLARED.findall(path.read_text())
    }
    known = {family.name for family in build_catalogue().own}
    suffixes = ("", "_total", "_info")
    missing = {name for name in declared if not known & {name + end for end in suffixes}}
    assert not missing, "declare them in scripts/dashboards/registry.py too"
    assert len(declared) > 50


def test_no_metric_has_a_label_that_a_scrape_adds() -> None:
    for family in build_catalogue().own:
        assert not set(family.values) & TAKEN_BY_MONITORS, family.name


def test_names_say_their_unit() -> None:
    for family in build_catalogue().own:
        assert (family.kind == "counter") == family.name.endswith("_total"), family.name
        assert not re.search(r"_(ms|us|percent|perc|kb|mb|gb)(_|$)", family.name), family.name
        if family.name.startswith("diptych_"):
            assert family.meaning.endswith("."), family.name
