"""Workers that take a request and forget it, though all that they say of themselves is well."""

import asyncio
from collections.abc import Awaitable, Sequence

from prometheus_client import CollectorRegistry

from rpc.v1 import worker_pb2
from tests.support.fake_sequence import expected
from tests.support.fake_worker import FakeWorker, fake_workers, until
from tests.support.router_fleet import make_request, router_on, run

PROMPT = [4, 5, 6, 7]
SETTINGS = {
    "stuck_after_s": 1.0,
    "default_decode_step_s": 1e-3,
    "default_prefill_tokens_per_s": 1e6,
}


def stuck(registry: CollectorRegistry) -> dict[str, float]:
    name = "diptych_router_stuck_total"
    counts = {
        stage: registry.get_sample_value(name, {"stage": stage})
        for stage in ("first_token", "transfer")
    }
    return {stage: count for stage, count in counts.items() if count}


async def forgetful(workers: Sequence[FakeWorker], role: str) -> FakeWorker:
    """The worker of a role that gets the request; it does no work from then on."""
    asked = [each for each in workers if each.role == role]
    await until(lambda: any(each.submits for each in asked), "it is placed")
    (worker,) = [each for each in asked if each.submits]
    return worker


async def finished(outputs: Awaitable[list[int]], prompt: Sequence[int] = PROMPT) -> None:
    async with asyncio.timeout(15):
        assert await outputs == expected(prompt, 8)


async def test_a_prompt_that_prefill_never_starts_goes_to_another_worker() -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(prefill=2, decode=2) as workers,
        router_on(workers, registry=registry, **SETTINGS) as router,
    ):
        for worker in workers:
            worker.running = worker.role == "decode"
        request = make_request(PROMPT)
        outputs = asyncio.create_task(run(router, request))
        bad = await forgetful(workers, "prefill")
        for worker in workers:
            worker.running = worker is not bad
        await finished(outputs)
        assert stuck(registry)["first_token"] == 1
        first, *_ = router.timeline(request.request_id)["attempts"]  # type: ignore[index,misc]
        assert first["failure"]["stuck_in"] == "first_token"
        assert bad.address in first["failure"]["message"]
        told = [worker for worker in workers if any(each.attempt == 1 for each in worker.aborts)]
        assert {worker.role for worker in told} == {"prefill", "decode"}, "both were told to stop"
        assert not bad.busy


async def test_a_hand_over_that_decode_never_ends_goes_to_another_pair() -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(prefill=2, decode=2) as workers,
        router_on(workers, registry=registry, **SETTINGS) as router,
    ):
        for worker in workers:
            worker.running = worker.role == "prefill"
            worker.report_first_import = False
        request = make_request(PROMPT)
        outputs = asyncio.create_task(run(router, request))
        bad = await forgetful(workers, "decode")
        for worker in workers:
            worker.running = worker is not bad
        await finished(outputs)
        assert stuck(registry)["transfer"] == 1
        assert not bad.busy


async def test_what_a_dead_engine_holds_is_taken_away_faster_and_faster() -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(decode=2) as workers,
        router_on(workers, registry=registry, **SETTINGS) as router,
    ):
        bad = workers[0]
        bad.running = False
        prompts = [[i, 5, 6, 7] for i in range(4, 28)]
        runs = [finished(run(router, make_request(prompt)), prompt) for prompt in prompts]
        await asyncio.gather(*runs)
        assert stuck(registry)["first_token"] >= len(bad.submits) > 4
        assert not bad.busy


async def test_a_fleet_that_stands_still_is_not_stormed() -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(decode=2) as workers,
        router_on(workers, registry=registry, **SETTINGS) as router,
    ):
        for worker in workers:
            worker.running = False
        requests = [make_request([i, 5], timeout_s=60) for i in range(20)]
        outputs = [asyncio.create_task(run(router, request)) for request in requests]
        await until(lambda: stuck(registry), "the first is tried elsewhere")
        await asyncio.sleep(2.5)  # some budgets more
        submits = sum(len(worker.submits) for worker in workers)
        assert submits <= len(requests) + 5, "one at a time was tried elsewhere"
        for worker in workers:
            worker.running = True
            worker.step()
        for output, request in zip(outputs, requests, strict=True):
            await finished(output, request.prompt_ids)


async def test_with_no_other_worker_it_is_waited_for() -> None:
    registry = CollectorRegistry()
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, registry=registry, **SETTINGS) as router,
    ):
        (only,) = workers
        only.running = False
        outputs = asyncio.create_task(run(router, make_request(PROMPT)))
        await asyncio.sleep(1.5)
        only.running = True
        only.step()
        await finished(outputs)
        assert not stuck(registry) and len(only.submits) == 1
        assert only.state == worker_pb2.WORKER_STATE_READY
