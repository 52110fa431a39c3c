"""Breakers in a router on fake workers: who is left alone, who is not, and how it comes back."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from core.errors import DiptychError
from router.dispatch import Dispatcher
from rpc.v1 import worker_pb2
from tests.support.fake_sequence import expected
from tests.support.fake_worker import FakeWorker, fake_workers, until
from tests.support.router_fleet import make_request, router_on, run

PROMPT = [4, 5]


async def served(router: Dispatcher) -> None:
    assert await run(router, make_request(PROMPT)) == expected(PROMPT, 8)


def submits(workers: list[FakeWorker]) -> list[int]:
    return [len(worker.submits) for worker in workers]


async def test_a_worker_that_fails_all_it_gets_is_left_alone_until_it_is_well() -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(decode=2) as workers,
        router_on(workers, registry=registry, breaker_open_s=0.5) as router,
    ):
        bad = workers[0]
        bad.fail = lambda _: ("internal", "on purpose")
        for _ in range(8):
            await served(router)
        assert len(bad.submits) == 3, "the fourth request did not try it"
        assert router.breakers.describe(bad.address)["state"] == "open"
        request = make_request(PROMPT)
        await run(router, request)
        refused = router.explain(request.request_id)["decisions"][0]["refused"]  # type: ignore[index]
        assert any(bad.address in each and "on purpose" in each for each in refused)

        bad.fail = lambda _: None
        await until(lambda: router.breakers.describe(bad.address)["state"] == "half_open")
        for _ in range(4):
            await served(router)
        assert len(bad.submits) > 4
        assert router.breakers.describe(bad.address)["state"] == "closed"
        openings = registry.get_sample_value(
            "diptych_router_breaker_openings_total", {"scope": "worker"}
        )
        assert openings == 1


async def test_with_nobody_else_a_failing_worker_is_used_all_the_same() -> None:
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, retry_backoff_s=0.01) as router,
    ):
        (only,) = workers
        left = [True] * 9
        only.fail = lambda _: ("internal", "on purpose") if left and left.pop() else None
        for _ in range(2):
            with pytest.raises(DiptychError, match=r"4 attempts.*on purpose"):
                await run(router, make_request(PROMPT))
        await served(router)


async def test_a_bad_client_takes_no_worker_out() -> None:
    """Its requests fail wherever they go, are invalid, end at once or are left."""
    async with (
        fake_workers(prefill=1, decode=2) as workers,
        router_on(workers, retry_backoff_s=0.01) as router,
    ):

        def fail(submit: worker_pb2.Submit) -> tuple[str, str] | None:
            if submit.prompt_ids[0] == 99:
                return "internal", "this prompt kills"
            return ("invalid_request", "bad grammar") if submit.prompt_ids[0] == 98 else None

        for worker in workers:
            worker.fail = fail
        for first in (99, 98) * 5:
            with pytest.raises(DiptychError):
                await run(router, make_request([first, 5]))
        for _ in range(5):
            with pytest.raises(DiptychError):
                await run(router, make_request([7, 5], max_tokens=3000, timeout_s=0.01))
            async with router.generate(make_request(PROMPT, max_tokens=3000)):
                await asyncio.sleep(0)
        states = {str(router.breakers.describe(each.address)["state"]) for each in workers}
        assert states == {"closed"}
        before = submits(workers)
        await served(router)
        assert submits(workers)[0] > before[0], "prefill still gets its prompts"


async def test_a_pair_that_cannot_hand_over_is_remembered_by_all_requests() -> None:
    async with (
        fake_workers(prefill=2, decode=1) as workers,
        router_on(workers, breaker_open_s=30) as router,
    ):
        p0, _, d = workers

        def fail(submit: worker_pb2.Submit) -> tuple[str, str] | None:
            source = getattr(submit, "import").prefill_worker_id
            return ("kv_transfer_failed", "dark") if source == p0.worker_id else None

        d.fail = fail
        for _ in range(6):
            await served(router)
        assert len(p0.submits) == 1, "one request found out for all"
        assert router.breakers.describe((p0.address, d.address))["state"] == "open"
        assert router.breakers.describe(p0.address)["state"] == "closed"
