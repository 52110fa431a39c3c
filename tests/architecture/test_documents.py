"""Documents name what is there, and those that are made from something are fresh."""

import re
from pathlib import Path

import pytest

from benchmarks.table import PAGES, latest, render

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
_METRIC = re.compile(r"`(diptych_[a-z_]+[a-z])(_?\*?)")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmark_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert render(page, text, latest()) == text, "run python -m benchmarks.table"


@pytest.mark.parametrize("page", DOCUMENTS, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for name, heading in _LINK.findall(page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), f"{name} is not there"
        if heading:
            assert heading in _headings(target), f"{name} has no heading for #{heading}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=shown)
def test_metrics_that_are_named_exist(page: Path) -> None:
    known = {name for name, _ in _METRIC.findall((ROOT / "docs" / "metrics.md").read_text())}
    for name, wildcard in _METRIC.findall(page.read_text()):
        series = re.sub(r"_(bucket|sum|count)$", "", name)
        found = any(each.startswith(name) for each in known) if wildcard else {name, series} & known
        assert found, f"no process has {name}; docs/metrics.md lists all metrics"


def _headings(page: Path) -> set[str]:
    """Anchors as renderers make them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
