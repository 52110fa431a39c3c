"""What masks may cost, by a clock of this test."""

import pytest

from core.errors import InvalidRequestError
from engine.grammar.budget import MEAN_S, SPARE_S, MaskBudget


class Worker:
    """Work that takes what it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.budget = MaskBudget(lambda: self.now)

    def do(self, seconds: float, num_tokens: int = 1) -> None:
        def work() -> None:
            self.now += seconds

        self.budget.spend(work, num_tokens)


def test_a_few_costly_places_are_borne() -> None:
    worker = Worker()
    for _ in range(20):
        worker.do(0.9 * SPARE_S)
        for _ in range(round(SPARE_S / MEAN_S)):
            worker.do(0.0)


def test_masks_that_all_are_costly_are_not() -> None:
    worker = Worker()
    for _ in range(1000):
        worker.do(MEAN_S)
    with pytest.raises(InvalidRequestError, match="takes too long"):
        for _ in range(round(SPARE_S / MEAN_S) + 2):
            worker.do(2 * MEAN_S)


def test_an_output_taken_over_from_another_worker_costs_what_its_tokens_did() -> None:
    worker = Worker()
    worker.do(1000 * MEAN_S, num_tokens=1000)
    worker.do(SPARE_S)
