import math

from hypothesis import given
from hypothesis import strategies as st

from telemetry.ledger import StageLedger

moments = st.floats(0, 1e6)
durations = st.dictionaries(st.sampled_from("abc"), st.floats(-1, 1e6), max_size=3)


@given(moments, st.lists(st.tuples(moments, durations, st.booleans()), max_size=8))
def test_stages_are_never_negative_and_sum_to_the_span(
    start: float, intervals: list[tuple[float, dict[str, float], bool]]
) -> None:
    ledger = StageLedger(start)
    for until, parts, known in intervals:
        ledger.advance(until, "rest", parts=parts, known=known)
    assert all(stage.seconds >= 0 for stage in ledger.stages)
    total = math.fsum(stage.seconds for stage in ledger.stages)
    assert math.isclose(total, ledger.total_s, abs_tol=1e-6)
    assert ledger.total_s == max([start, *(until for until, _, _ in intervals)]) - start
    assert 0 <= ledger.unattributed_s <= total + 1e-6


def test_parts_come_before_the_rest_in_order() -> None:
    ledger = StageLedger(10.0)
    ledger.advance(14.0, "rest", parts={"first": 1.0, "second": 2.0}, attempt=3)
    stages = [(stage.name, stage.seconds, stage.attempt) for stage in ledger.stages]
    assert stages == [("first", 1.0, 3), ("second", 2.0, 3), ("rest", 1.0, 3)]
