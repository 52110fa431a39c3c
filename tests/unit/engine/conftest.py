"""Engine tests run twice: one step at a time, and planning ahead of the step in flight."""

from functools import partial

import pytest

from tests.support.engine import MakeEngine, make_engine


@pytest.fixture(params=[False, True], ids=["in_turn", "ahead"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    """Whether the executor takes a step while another one is in flight."""
    ahead: bool = request.param
    return ahead


@pytest.fixture(name="make_engine")
def make_engine_of_either_kind(overlaps: bool) -> MakeEngine:
    """Builds engines on such an executor."""
    return partial(make_engine, overlaps=overlaps)
