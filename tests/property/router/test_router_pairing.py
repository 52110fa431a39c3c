"""The search for the cheapest pair skips pairs; it must never skip the cheapest."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement.columns import WorkerColumns
from router.placement.pairing import Side, cheapest_pair
from tests.support.router_placement import COST, make_columns, make_view

COSTS = st.integers(0, 8).map(lambda eighths: eighths / 8)
RATES = st.sampled_from([1e4, 5e5, 1e6, 5e6])
ASSUMED = COST.transfer_bytes_per_s


@st.composite
def sides(draw: st.DrawFn) -> tuple[WorkerColumns, Side, Side, list[int]]:
    exporters = [
        make_view(f"p{i}", "prefill", placed=draw(st.integers(0, 2)))
        for i in range(draw(st.integers(1, 4)))
    ]
    names = st.sampled_from([f"p{i}" for i in range(5)])
    importers = [
        make_view(f"d{i}", "decode", link_bytes_per_s=draw(st.dictionaries(names, RATES)))
        for i in range(draw(st.integers(1, 4)))
    ]
    views = draw(st.permutations([*exporters, *importers]))
    columns = make_columns(views)

    def side(members: list) -> Side:  # type: ignore[type-arg]
        rows = [columns.row(view.key) for view in members]
        costs = [draw(COSTS) for _ in rows]
        return Side(rows=np.array(rows), cost_s=np.array(costs))

    kv_bytes = [draw(st.integers(0, 4_000_000)) for _ in importers]
    return columns, side(exporters), side(importers), kv_bytes


@settings(max_examples=300, deadline=None)
@given(sides(), st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7))))
def test_no_pair_is_cheaper_than_the_one_found(
    drawn: tuple[WorkerColumns, Side, Side, list[int]], dark: set[tuple[int, int]]
) -> None:
    columns, exporters, importers, kv_bytes = drawn
    costs = {}
    for source, source_s in zip(exporters.rows, exporters.cost_s, strict=True):
        for target, target_s, size in zip(importers.rows, importers.cost_s, kv_bytes, strict=True):
            links = columns.view(target).load.link_bytes_per_s
            rate = links.get(columns.view(source).key, ASSUMED)
            if (source, target) not in dark:
                costs[source, target] = source_s + target_s + size / rate
    pair = cheapest_pair(columns, exporters, importers, np.array(kv_bytes, float), sorted(dark))
    assert (pair is None) == (not costs)
    if pair is None:
        return
    assert abs(pair.cost_s - min(costs.values())) < 1e-6
    assert abs(pair.cost_s - costs[pair.exporter, pair.importer]) < 1e-6


def test_no_pair_without_two_sides() -> None:
    columns = make_columns([make_view("p", "prefill")])
    nobody = Side(rows=np.array([], int), cost_s=np.array([]))
    some = Side(rows=np.array([0]), cost_s=np.array([1.0]))
    assert cheapest_pair(columns, some, nobody, np.array([])) is None
    assert cheapest_pair(columns, nobody, some, np.array([1.0])) is None
