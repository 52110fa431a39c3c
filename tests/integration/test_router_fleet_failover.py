import asyncio
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from core.errors import DiptychError, TransferError, UnavailableError
from router.dispatch import Dispatcher
from router.main import dispatcher_on_fleet
from router.settings import RouterSettings
from rpc.v1 import worker_pb2
from tests.support.fake_sequence import EOS, expected
from tests.support.fake_worker import DEADLINE_S, FakeWorker, fake_workers, until
from tests.support.process import free_port
from tests.support.router_fleet import batches, collect, make_request, ready_workers, router_on, run


def attempts_of(router: Dispatcher, request_id: str) -> list[dict[str, object]]:
    timeline = router.timeline(request_id)
    assert timeline is not None
    return timeline["attempts"]  # type: ignore[return-value]


async def test_decode_that_dies_mid_stream_costs_no_token() -> None:
    async with fake_workers(prefill=1, decode=2) as workers, router_on(workers) as router:
        prompt, seen = [3, 1, 4, 1, 5], []
        request = make_request(prompt, 200, seed=9)
        async with router.generate(request) as generation:
            async for batch in batches(generation):
                seen += [token.token_id for token in batch]
                victims = [w for w in workers[1:] if w.busy]
                if len(seen) > 20 and len(workers[0].submits) == 1 and victims:
                    victims[0].break_streams()
        assert seen == expected(prompt, 200, seed=9)
        resumed = workers[0].submits[1]
        assert resumed.attempt == 2
        assert list(resumed.output_ids) == expected(prompt, 200, seed=9)[: len(resumed.output_ids)]
        assert len(resumed.output_ids) > 20
        assert resumed.sampling.max_tokens == 200
        assert len(resumed.block_hashes) // 16 == (5 + len(resumed.output_ids)) // 4
        used = [attempt["workers"]["decode"] for attempt in attempts_of(router, request.request_id)]
        assert sorted(used) == ["decode-0", "decode-1"]


async def test_all_streams_survive_one_worker_under_load() -> None:
    async with fake_workers(prefill=2, decode=2) as workers, router_on(workers) as router:
        p0, p1, d0, d1 = workers
        p0.running = p1.running = d0.running = d1.running = False
        prompts = [[index + 3, 7, index] for index in range(32)]
        running = [asyncio.create_task(run(router, make_request(p, 60))) for p in prompts]
        await until(lambda: len(p0.busy) > 3 and len(d0.busy) > 3)
        p0.break_streams()
        p0.running = p1.running = d0.running = d1.running = True
        await until(lambda: len(d0.busy) > 3 and p1.handed & set(d0.busy))
        d0.break_streams()
        assert await asyncio.gather(*running) == [expected(p, 60) for p in prompts]
        await until(lambda: not any(worker.busy for worker in workers))


async def test_prefill_that_dies_before_the_hand_over_is_replaced() -> None:
    async with fake_workers(prefill=2, decode=1) as (p0, p1, d), router_on((p0, p1, d)) as router:
        p0.running = p1.running = False
        task = asyncio.create_task(run(router, make_request([4, 5, 6])))
        await until(lambda: (p0.busy or p1.busy) and d.busy)
        dying, other = (p0, p1) if p0.busy else (p1, p0)
        other.running = True
        dying.break_streams()
        assert await task == expected([4, 5, 6], 8)
        assert [abort.attempt for abort in d.aborts] == [1]


async def test_prefill_that_dies_after_the_hand_over_is_not_missed() -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        d.running = False
        request = make_request([4, 5, 6])
        async with router.generate(request) as generation:
            first = await anext(batches(generation))
            await until(lambda: p.handed)
            await until(lambda: router.timeline(request.request_id)["attempts"][0]["cached_tokens"])
            p.break_streams()
            d.running = True
            rest = [token async for batch in batches(generation) for token in batch]
        tokens = [token.token_id for token in (*first, *rest)]
        assert tokens == expected([4, 5, 6], 8)
        assert len(attempts_of(router, request.request_id)) == 1


async def test_silent_worker_is_taken_for_lost() -> None:
    async with (
        fake_workers(decode=2) as workers,
        router_on(workers, worker_silence_s=0.3) as router,
    ):
        for worker in workers:
            worker.running = False
        task = asyncio.create_task(run(router, make_request([4, 5])))
        await until(lambda: any(w.busy for w in workers))
        silent, other = workers if workers[0].busy else workers[::-1]
        silent.reporting = False
        other.running = True
        assert await task == expected([4, 5], 8)
        await until(lambda: not silent.busy, "the closed stream aborts what came over it")
        silent.reporting = True
        await until(lambda: silent.attaches >= 2, "it is taken back")


async def test_stalled_worker_is_left_and_taken_back_when_it_turns_again() -> None:
    async with fake_workers(decode=1) as workers:
        registry = CollectorRegistry()
        async with router_on(workers, registry=registry) as router:
            worker = workers[0]
            worker.running = False
            task = asyncio.create_task(run(router, make_request([4, 5])))
            await until(lambda: worker.busy)
            worker.state = worker_pb2.WORKER_STATE_STALLED
            await until(lambda: ready_workers(registry) == 0 and worker.attaches >= 2)
            assert ready_workers(registry) == 0, "attached again although it stands still"
            worker.state, worker.running = worker_pb2.WORKER_STATE_READY, True
            assert await task == expected([4, 5], 8)


async def test_one_restart_of_the_only_worker_kills_no_request() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers) as router:
        worker = workers[0]
        task = asyncio.create_task(run(router, make_request([4, 5], 300)))
        await until(lambda: worker.busy)
        await worker.stop()
        await asyncio.sleep(0.1)
        await worker.start()
        assert await task == expected([4, 5], 300)


async def test_no_worker_for_the_grace_is_one_clear_error() -> None:
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, no_worker_grace_s=0.2) as router,
    ):
        worker = workers[0]
        worker.running = False
        request = make_request([4, 5])
        async with router.generate(request) as generation:
            await until(lambda: worker.busy)
            await worker.stop()
            with pytest.raises(UnavailableError, match=r"Waited 0\.2 s.*was lost"):
                await collect(generation)
        with pytest.raises(UnavailableError, match=worker.address):
            await run(router, make_request([4, 5]))
        timeline = router.timeline(request.request_id)
        assert timeline is not None and timeline["outcome"] == "unavailable"
        await worker.start()


def failing(*codes: str) -> Callable[[worker_pb2.Submit], tuple[str, str] | None]:
    left = list(codes)
    return lambda _: (left.pop(0), "on purpose") if left else None


async def test_retryable_failure_goes_to_another_worker_at_once() -> None:
    async with (
        fake_workers(decode=2) as workers,
        router_on(workers, retry_backoff_s=60) as router,
    ):
        workers[0].fail = workers[1].fail = failing("overloaded")
        assert await run(router, make_request([4, 5])) == expected([4, 5], 8)
        assert [len(worker.submits) for worker in workers] == [1, 1]


async def test_retryable_failure_of_the_only_worker_is_tried_again_after_a_backoff() -> None:
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, retry_backoff_s=0.02) as router,
    ):
        workers[0].fail = failing("overloaded", "unavailable")
        assert await run(router, make_request([4, 5])) == expected([4, 5], 8)
        assert [submit.attempt for submit in workers[0].submits] == [1, 2, 3]


async def test_attempts_are_bounded() -> None:
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, retry_backoff_s=0.01) as router,
    ):
        workers[0].fail = lambda _: ("kv_transfer_failed", "on purpose")
        with pytest.raises(TransferError, match=r"4 attempts.*on purpose"):
            await run(router, make_request([4, 5]))
        assert len(workers[0].submits) == 4


@pytest.mark.parametrize("code", ["internal", "no such code"])
async def test_an_internal_error_is_cured_by_another_worker(code: str) -> None:
    async with (
        fake_workers(decode=2) as workers,
        router_on(workers, retry_backoff_s=60) as router,
    ):
        workers[0].fail = workers[1].fail = failing(code)
        assert await run(router, make_request([4, 5])) == expected([4, 5], 8)
        assert [len(worker.submits) for worker in workers] == [1, 1]


@pytest.mark.parametrize("code", ["invalid_request", "context_length_exceeded"])
async def test_other_failures_reach_the_client_once(code: str) -> None:
    # Met elsewhere: A failure of prefill got lost on the way, and decode hung.
    async with fake_workers(prefill=1, decode=2) as workers, router_on(workers) as router:
        workers[0].fail = failing(code)
        with pytest.raises(DiptychError, match="on purpose") as caught:
            await run(router, make_request([4, 5]))
        assert caught.value.code == code
        assert len(workers[0].submits) == 1
        await until(lambda: not any(worker.busy for worker in workers))


async def test_failed_transfer_degrades_to_local_prefill() -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        p.running = False
        d.fail = failing("kv_transfer_failed")
        request = make_request([4, 5])
        async with router.generate(request) as generation:
            assert await collect(generation) == expected([4, 5], 8)
            assert generation.end.mode == "decode_only"
        await until(lambda: not p.busy)
        assert d.submits[1].WhichOneof("phase") == "local"


async def test_worker_lost_after_the_last_token_ends_the_request_well() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers) as router:
        worker = workers[0]
        worker.silent_ends, worker.running, worker.end_with_eos_at = True, False, 2
        async with router.generate(make_request([4, 5], 50)) as generation:
            await until(lambda: worker.busy)
            for _ in range(3):
                worker.step()
            seen: list[int] = []
            async for batch in batches(generation):
                seen += [token.token_id for token in batch]
                if seen[-1] == EOS:
                    worker.break_streams()
            assert generation.end.finish_reason == "stop"
        assert seen[-1] == EOS and len(seen) == 3
        assert len(worker.submits) == 1


async def test_output_is_never_continued_by_another_model() -> None:
    # Met elsewhere: A rolling update paired two versions, or two sets of weights of one
    # shape.
    async with fake_workers(decode=2) as workers:
        workers[1].digest = b"another"
        async with router_on(workers, no_worker_grace_s=0.2) as router:
            request = make_request([4, 5], 4000)
            async with router.generate(request) as generation:
                await anext(batches(generation))
                holder: FakeWorker = next(w for w in workers if w.busy)
                await holder.stop()
                with pytest.raises(UnavailableError, match="another model"):
                    async for _ in batches(generation):
                        pass
            await holder.start()


async def test_failed_attempts_are_stages_of_their_own() -> None:
    async with fake_workers(decode=2) as workers, router_on(workers) as router:
        workers[0].fail = workers[1].fail = failing("overloaded")
        request = make_request([4, 5])
        await run(router, request)
        timeline = router.timeline(request.request_id)
        assert timeline is not None
        stages = timeline["stages"]
        assert isinstance(stages, list)
        assert [(stage["name"], stage["attempt"]) for stage in stages][:4] == [
            ("tokenize", None),
            ("route", 1),
            ("failed_attempt", 1),
            ("reroute", 2),
        ]
        assert sum(s["seconds"] for s in stages) == pytest.approx(timeline["end_to_end_s"])
        failure = attempts_of(router, request.request_id)[0]["failure"]
        assert failure == {"code": "overloaded", "message": "on purpose", "stuck_in": None}


async def test_a_worker_that_was_never_reached_shows_as_lost() -> None:
    registry = CollectorRegistry()
    settings = RouterSettings.model_validate({"decode": (f"127.0.0.1:{free_port()}",)})
    async with dispatcher_on_fleet(settings, registry, None):
        for state, count in (("lost", 1), ("ready", 0)):
            labels = {"role": "decode", "state": state}
            assert registry.get_sample_value("diptych_router_workers", labels) == count


async def test_router_ends_at_whatever_moment_its_links_do() -> None:
    """A link whose stream has just broken must hear that the router ends."""
    async with fake_workers(decode=1) as workers:
        for turns in range(40):
            async with asyncio.timeout(DEADLINE_S), router_on(workers):
                workers[0].break_streams()
                for _ in range(turns):
                    await asyncio.sleep(0)
