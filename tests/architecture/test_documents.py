"""Documents that are made from something are made from what is there now."""

from pathlib import Path

import pytest

from benchmarks.table import PAGES, latest, render


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmark_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert render(page, text, latest()) == text, "run python -m benchmarks.table"
