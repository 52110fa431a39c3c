from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from core.errors import DeadlineError, InvalidRequestError, OverloadedError
from router.api.errors import ClientDisconnectedError
from router.api.metrics import ApiMetrics, TokenTimer
from router.api.slo import SloTargets

TARGETS = SloTargets(ttft_s=1.0, tpot_s=0.1, itl_s=0.2)


class Judge:
    """Runs sequences past a timer and says what was counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ApiMetrics(self.registry, TARGETS).of("chat")

    def run(self, gaps: Sequence[float], *, tokens: int = 1) -> "Judge":
        timer, now = TokenTimer(self.metrics, 100.0), 100.0
        for gap in gaps:
            now += gap
            timer.arrived(now, tokens)
        timer.ended()
        return self

    def counted(self) -> dict[str, tuple[float, float]]:
        """Target to how many met and missed it; of those that were judged."""
        counts = {}
        for target in ("ttft", "tpot", "itl", "all"):
            met, missed = (
                self.registry.get_sample_value(
                    "diptych_router_slo_sequences_total", {"target": target, "outcome": outcome}
                )
                for outcome in ("met", "missed")
            )
            assert met is not None and missed is not None, "both show from the start"
            if met or missed:
                counts[target] = (met, missed)
        return counts


MET, MISSED = (1, 0), (0, 1)


@pytest.mark.parametrize(
    ("gaps", "counts"),
    [
        ([0.9, 0.05, 0.05], {"ttft": MET, "tpot": MET, "itl": MET, "all": MET}),
        ([1.1, 0.05, 0.05], {"ttft": MISSED, "tpot": MET, "itl": MET, "all": MISSED}),
        ([0.9, 0.15, 0.15], {"ttft": MET, "tpot": MISSED, "itl": MET, "all": MISSED}),
        ([0.9, 0.01, 0.25, 0.01], {"ttft": MET, "tpot": MET, "itl": MISSED, "all": MISSED}),
        ([0.9, *[0.01] * 99, 0.25], {"ttft": MET, "tpot": MET, "itl": MET, "all": MET}),
        ([0.9], {"ttft": MET, "all": MET}),
        ([], {}),
    ],
)
def test_a_sequence_meets_each_target_or_misses_it(
    gaps: list[float], counts: dict[str, tuple[float, float]]
) -> None:
    assert Judge().run(gaps).counted() == counts


def test_several_tokens_at_once_make_one_gap_and_a_short_mean() -> None:
    judge = Judge().run([0.1, 0.15, 0.15], tokens=4)
    assert judge.counted()["tpot"] == MET
    mean_s = judge.registry.get_sample_value(
        "diptych_router_time_per_output_token_seconds_sum", {"api": "chat"}
    )
    assert mean_s == pytest.approx(0.3 / 11)


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (DeadlineError("late"), {"all": MISSED}),
        (OverloadedError("full"), {"all": MISSED}),
        (RuntimeError("ours"), {"all": MISSED}),
        (InvalidRequestError("theirs"), {}),
        (ClientDisconnectedError(), {}),
    ],
)
def test_an_error_misses_unless_it_is_its_clients(
    error: Exception, counts: dict[str, tuple[float, float]]
) -> None:
    judge = Judge()
    TokenTimer(judge.metrics, 0.0).failed(error)
    assert judge.counted() == counts


def test_targets_show_as_set() -> None:
    registry = Judge().registry
    for target, target_s in (("ttft", 1.0), ("tpot", 0.1), ("itl", 0.2)):
        labels = {"target": target}
        assert registry.get_sample_value("diptych_router_slo_target_seconds", labels) == target_s
