"""A router whose own streams break on purpose: answers stay what they are."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from router.settings import RouterSettings
from tests.support.fake_sequence import expected
from tests.support.fake_worker import fake_workers
from tests.support.router_fleet import make_request, router_on, run


@pytest.mark.parametrize(
    ("faults", "retries"),
    [
        ("rpc.link.receive:cut@0.02;seed=4", True),
        ("rpc.link.send:cut@0.04;seed=1", True),
        ("rpc.link.open:refuse@0.5;rpc.link.receive:delay=2ms@0.5;seed=1", False),
    ],
)
async def test_answers_survive_streams_that_break(faults: str, retries: bool) -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(prefill=2, decode=2) as workers,
        router_on(
            workers,
            registry=registry,
            faults=faults,
            max_attempts=50,
            retry_backoff_s=0.001,
            breaker_open_s=0.05,
        ) as router,
    ):
        prompts = [[4, 5 + number] for number in range(20)]
        answers = await asyncio.gather(*(run(router, make_request(each, 60)) for each in prompts))
    assert answers == [expected(prompt, 60) for prompt in prompts]
    lost = registry.get_sample_value("diptych_router_retries_total", {"reason": "worker_lost"})
    assert bool(lost) == retries


def test_a_wrong_fault_is_refused_with_the_settings() -> None:
    with pytest.raises(ValidationError, match=r"did you mean rpc\.link\.send"):
        RouterSettings.model_validate({"faults": "rpc.link.sent:cut"})
