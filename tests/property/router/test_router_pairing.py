"""The search for the cheapest pair skips pairs; it must never skip the cheapest."""

from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement.decision import Candidate
from router.placement.pairing import Scored, cheapest_pair, link_rate
from tests.support.router_placement import make_view

ASSUMED = 1000.0
COSTS = st.integers(0, 8).map(lambda eighths: eighths / 8)
RATES = st.sampled_from([10.0, 500.0, 1000.0, 5000.0])


@st.composite
def workers(draw: st.DrawFn) -> tuple[list[Scored], list[Scored]]:
    exporters = [
        Scored(
            make_view(f"p{i}", "prefill", placed=draw(st.integers(0, 2))),
            Candidate(f"p{i}", "prefill", 0, {"prefill_s": draw(COSTS)}),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    names = st.sampled_from([f"p{i}" for i in range(5)])
    importers = [
        Scored(
            make_view(f"d{i}", "decode", link_bytes_per_s=draw(st.dictionaries(names, RATES))),
            Candidate(f"d{i}", "decode", 0, {"decode_s": draw(COSTS)}),
            draw(st.integers(0, 4000)),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    return exporters, importers


@settings(max_examples=300, deadline=None)
@given(workers())
def test_no_pair_is_cheaper_than_the_one_found(sides: tuple[list[Scored], list[Scored]]) -> None:
    exporters, importers = sides
    costs = [
        exporter.candidate.cost_s
        + importer.reading_at(link_rate(exporter, importer, ASSUMED)).candidate.cost_s
        for exporter in exporters
        for importer in importers
    ]
    pair = cheapest_pair(exporters, importers, ASSUMED)
    assert pair is not None
    assert abs(pair.cost_s - min(costs)) < 1e-9


def test_no_pair_without_two_sides() -> None:
    assert cheapest_pair([], [], ASSUMED) is None
