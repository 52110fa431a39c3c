"""Three prefill and three decode workers under a seeded schedule of blows; nothing may be lost."""

from pathlib import Path

import pytest

from tests.support.chaos import make_model, run_chaos
from tests.support.chaos_plan import ChaosPlan

SEED = 7


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_answer_is_the_undisturbed_one_and_every_pool_balances(tmp_path: Path) -> None:
    report = run_chaos(make_model(tmp_path), ChaosPlan(seed=SEED, duration_s=30.0))
    assert not report.failures, f"{report}\n{report.log}"
    assert sum(report.answers.values()) == 200
    assert sum(report.retries.values()) > 10, f"the blows hit nothing: {report}"
