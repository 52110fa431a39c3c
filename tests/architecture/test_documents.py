"""Documents that are made from something are made from what is there now."""

from benchmarks.table import README, render


def test_benchmark_tables_are_those_of_the_results() -> None:
    text = README.read_text()
    assert render(text) == text, "run python -m benchmarks.table"
