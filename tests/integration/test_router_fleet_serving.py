import asyncio
import socket
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from core.block_hash import hash_blocks, pack_hashes, root_hash
from core.errors import (
    DeadlineError,
    ErrorCode,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from core.finish import FinishReason
from router.main import dispatcher_on_fleet
from router.settings import RouterSettings
from tests.support.fake_sequence import EOS, expected
from tests.support.fake_worker import fake_workers, until
from tests.support.router_fleet import batches, collect, make_request, ready_workers, router_on, run


async def test_a_pair_serves_a_request_in_two_legs() -> None:
    # Met elsewhere: Prefill and decode each tokenized the prompt.
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        prompt = list(range(10, 30))
        request = make_request(prompt, 6, seed=5)
        async with router.generate(request) as generation:
            tokens = await collect(generation)
            assert generation.end.finish_reason is FinishReason.LENGTH
            assert generation.end.mode == "disaggregated"
            assert generation.end.cached_tokens == 1
        assert tokens == expected(prompt, 6, seed=5)
        export, imported = p.submits[0], d.submits[0]
        assert export.export.decode_worker_id == "decode-0"
        assert getattr(imported, "import").kv_address == p.address
        assert getattr(imported, "import").prefill_epoch == p.epoch
        hashes = hash_blocks(prompt, p.block_size, root_hash(p.digest))
        assert export.block_hashes == imported.block_hashes == pack_hashes(hashes)
        assert export.sampling.seed == 5
        assert 0 < export.deadline_ms <= 20_000
        assert not p.aborts and not d.aborts


async def test_abort_ends_a_request_with_what_it_has_on_both_workers() -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        request = make_request(list(range(10, 30)), 500)
        async with router.generate(request) as generation:
            first = await anext(batches(generation))
            assert router.abort(request.request_id)
            assert not router.abort(request.request_id), "it has ended already"
            rest = await collect(generation)
            assert generation.end.finish_reason is FinishReason.ABORTED
        tokens = [token.token_id for token in first] + rest
        assert tokens == expected(list(request.prompt_ids), len(tokens))
        assert router.abort_all() == 0
        await until(lambda: d.aborts and not p.busy and not d.busy, "both workers to be free")


async def test_sequences_of_one_prompt_are_computed_by_one_worker() -> None:
    async with fake_workers(prefill=2, decode=1) as (p, q, d), router_on((p, q, d)) as router:
        prompt = list(range(10, 80))
        first = make_request(prompt, 6)
        others = [
            replace(make_request(prompt, 6), shares_prompt_with=first.request_id) for _ in range(5)
        ]
        outputs = await asyncio.gather(*(run(router, each) for each in (first, *others)))
        assert outputs == [expected(prompt, 6)] * 6
        assert sorted((len(p.submits), len(q.submits))) == [0, 6]
        assert len(d.submits) == 6


async def test_flush_names_the_worker_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    settings = RouterSettings(decode=(address,))
    async with dispatcher_on_fleet(settings, CollectorRegistry(), None) as (_, fleet):
        await until(fleet.describe, "the worker to be listed")
        (answer,) = await fleet.flush_caches()
        assert answer["address"] == address and "UNAVAILABLE" in str(answer["error"])
        (about,) = fleet.describe()
        assert about.pop("cause")
        assert about == {"address": address, "role": "decode", "state": "lost"}


async def test_first_token_only_from_prefill_leaves_no_gap() -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        d.report_first_import = False
        assert await run(router, make_request([7, 8, 9], 5)) == expected([7, 8, 9], 5)


async def test_output_that_ends_at_the_first_token_aborts_decode() -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        p.end_with_eos_at = 0
        async with router.generate(make_request([7, 8, 9], 5)) as generation:
            assert await collect(generation) == [EOS]
            assert generation.end.finish_reason is FinishReason.STOP
        await until(lambda: d.aborts and not d.busy, "decode is told")


@pytest.mark.parametrize(
    ("prefill", "decode", "mode"), [(0, 1, "decode_only"), (1, 0, "prefill_only")]
)
async def test_one_pool_serves_alone(prefill: int, decode: int, mode: str) -> None:
    # Met elsewhere: The only decode worker was lost, and the model with it, though prefill
    # was well.
    async with (
        fake_workers(prefill=prefill, decode=decode) as workers,
        router_on(workers) as router,
        router.generate(make_request([5, 6], 4)) as generation,
    ):
        assert await collect(generation) == expected([5, 6], 4)
        assert generation.end.mode == mode


async def test_64_concurrent_requests_are_not_mixed_up() -> None:
    async with fake_workers(prefill=2, decode=2) as workers, router_on(workers) as router:
        prompts = [[index + 3, *range(10, 10 + index % 17)] for index in range(64)]
        outputs = await asyncio.gather(
            *(run(router, make_request(prompt, 5 + len(prompt))) for prompt in prompts)
        )
        assert outputs == [expected(prompt, 5 + len(prompt)) for prompt in prompts]
        used = [sum(1 for _ in worker.submits) for worker in workers]
        assert min(used) >= 16, f"placements are uneven: {used}"
        assert not any(worker.busy for worker in workers)


async def test_slow_client_loses_nothing() -> None:
    async with (
        fake_workers(prefill=1, decode=1) as workers,
        router_on(workers) as router,
        router.generate(make_request([9, 9], 30)) as generation,
    ):
        await until(lambda: router.timeline(_id(generation))["outcome"] == "length")
        assert await collect(generation) == expected([9, 9], 30)


def _id(generation: object) -> str:
    return generation.request.request_id  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("tokens_before", [0, 1, 3])
async def test_client_that_leaves_frees_both_workers(tokens_before: int) -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        p.running = d.running = tokens_before > 0
        async with router.generate(make_request([4, 5], 4000)) as generation:
            if tokens_before:
                seen = 0
                async for batch in batches(generation):
                    seen += len(batch)
                    if seen >= tokens_before:
                        break
            else:
                await until(lambda: p.busy and d.busy)
        await until(lambda: not p.busy and not d.busy, "both are told")
        assert router.timeline(_id(generation))["outcome"] == "cancelled"


async def test_task_cancellation_frees_both_workers() -> None:
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        p.running = False
        task = asyncio.create_task(run(router, make_request([4, 5])))
        await until(lambda: p.busy and d.busy)
        task.cancel()
        await until(lambda: not p.busy and not d.busy)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_deadline_ends_the_request_and_frees_both_workers() -> None:
    # Met elsewhere: Requests hung for minutes after their workers were chosen.
    async with fake_workers(prefill=1, decode=1) as (p, d), router_on((p, d)) as router:
        d.running = False
        request = make_request([4, 5], timeout_s=0.15)
        async with router.generate(request) as generation:
            with pytest.raises(DeadlineError, match="1 of at most 8"):
                await collect(generation)
            await until(lambda: not p.busy and not d.busy)
        with pytest.raises(DeadlineError):
            await run(router, make_request([4, 5], timeout_s=-1))


async def test_too_long_a_request_says_both_lengths() -> None:
    async with fake_workers(decode=1) as workers:
        workers[0].max_model_len = 20
        async with router_on(workers) as router:
            with pytest.raises(InvalidRequestError, match=r"15 tokens.*6.*20") as caught:
                await run(router, make_request(list(range(3, 18)), 6))
            assert caught.value.code is ErrorCode.CONTEXT_LENGTH
            assert not workers[0].submits


async def test_one_request_above_the_limit_is_refused() -> None:
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, max_in_flight=1, max_queued=0) as router,
        router.generate(make_request([4], 4000)),
    ):
        assert not router.ready
        with pytest.raises(OverloadedError) as caught:
            await run(router, make_request([5]))
        assert caught.value.retry_after_s >= 1


async def test_model_is_unknown_until_a_worker_answers() -> None:
    async with fake_workers(decode=1) as workers:
        await workers[0].stop()
        async with router_on(workers, attach=False) as router:
            assert not router.ready
            with pytest.raises(UnavailableError, match=workers[0].address):
                _ = router.model
            await workers[0].start()
            await until(lambda: router.ready)
            assert router.model.name == "fake"
            assert router.model.eos_token_ids == (EOS,)


async def test_draining_worker_gets_nothing_new() -> None:
    async with fake_workers(decode=2) as (first, second):
        registry = CollectorRegistry()
        async with router_on((first, second), registry=registry) as router:
            first.state = 2
            await until(lambda: ready_workers(registry) == 1)
            for _ in range(4):
                await run(router, make_request([3, 4]))
            assert not first.submits and len(second.submits) == 4


async def test_drain_waits_for_running_requests_and_refuses_new_ones() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers) as router:
        workers[0].running = False
        running = asyncio.create_task(run(router, make_request([4], 3)))
        await until(lambda: workers[0].busy)
        draining = asyncio.create_task(router.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await run(router, make_request([5]))
        assert not draining.done()
        workers[0].running = True
        assert await running == expected([4], 3)
        await draining


async def test_drain_ends_with_an_error_what_takes_too_long() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers) as router:
        workers[0].running = False
        running = asyncio.create_task(run(router, make_request([4], 3)))
        await until(lambda: workers[0].busy)
        await router.drain(0.01)
        with pytest.raises(UnavailableError, match="shutting down"):
            await running
        await until(lambda: not workers[0].busy)


async def test_requests_follow_the_cached_prefix() -> None:
    async with fake_workers(decode=3) as workers:
        registry = CollectorRegistry()
        async with router_on(workers, registry=registry) as router:
            prompt = list(range(3, 67))
            hashes = hash_blocks(prompt, 4, root_hash(b"digest"))
            workers[2].tell_cache(stored=pack_hashes(hashes))
            await until(lambda: registry.get_sample_value("diptych_router_indexed_blocks") == 16)
            request = make_request(prompt, 2)
            await run(router, request)
            assert len(workers[2].submits) == 1
            timeline = router.timeline(request.request_id)
            assert timeline is not None
            decision = timeline["attempts"][0]["decision"]  # type: ignore[index]
            assert decision["predicted_cached_tokens"] == 63
            assert decision["candidates"][0]["worker"] == workers[2].address


async def test_gap_in_cache_events_asks_for_a_snapshot_once() -> None:
    # Met elsewhere: The index kept blocks of a restarted engine, or brought back what was
    # gone.
    async with fake_workers(decode=1) as workers:
        registry = CollectorRegistry()
        async with router_on(workers, registry=registry):

            def indexed() -> float | None:
                return registry.get_sample_value("diptych_router_indexed_blocks")

            worker = workers[0]
            one, two, three = (bytes([value]) * 16 for value in range(3))
            worker.tell_cache(stored=one)
            await until(lambda: indexed() == 1)
            worker.tell_cache(stored=two, lose=1)
            await until(lambda: indexed() == 0)
            await until(lambda: worker.resyncs)
            worker.tell_cache(stored=two)
            worker.tell_cache(stored=three)
            await until(lambda: indexed() == 2)
            assert worker.resyncs == 1
            assert registry.get_sample_value("diptych_router_resyncs_total") == 1


async def test_another_epoch_in_cache_events_asks_for_a_snapshot() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers):
        workers[0].tell_cache(epoch=99)
        await until(lambda: workers[0].resyncs)


async def test_stages_sum_to_the_end_to_end_time() -> None:
    async with fake_workers(prefill=1, decode=1) as workers, router_on(workers) as router:
        request = make_request([3, 4, 5], 10)
        await run(router, request)
        timeline = router.timeline(request.request_id)
        assert timeline is not None
        stages = timeline["stages"]
        assert isinstance(stages, list)
        assert [stage["name"] for stage in stages] == [
            "tokenize", "route", "prefill_queue", "prefill", "prefill_rpc", "transfer",
            "decode_queue", "first_decode", "handover_rpc", "decode", "deliver",
        ]  # fmt: skip
        total = sum(stage["seconds"] for stage in stages)
        assert total == pytest.approx(timeline["end_to_end_s"], abs=1e-9)
        assert all(stage["seconds"] >= 0 for stage in stages)
        assert timeline["unattributed_s"] == 0
        assert timeline["output_tokens"] == 10
        assert router.timeline("unknown") is None


async def test_only_the_latest_timelines_are_kept() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers, timelines=2) as router:
        requests = [make_request([3], 1) for _ in range(3)]
        for request in requests:
            await run(router, request)
        kept = [router.timeline(request.request_id) is not None for request in requests]
        assert kept == [False, True, True]


async def test_request_above_the_limit_waits_for_its_turn_and_says_so() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers, max_in_flight=1) as router:
        request = make_request([5], 4)
        async with asyncio.TaskGroup() as group, router.generate(make_request([4], 4000)):
            waiting = group.create_task(run(router, request))
            await until(lambda: router.explain(request.request_id), "the second is known")
            await until(lambda: workers[0].submits, "the first has come")
            assert len(workers[0].submits) == 1
        assert waiting.result() == expected([5], 4)
        timeline = router.timeline(request.request_id)
        assert timeline is not None
        stages = timeline["stages"]
        assert isinstance(stages, list)
        assert "queue" in [stage["name"] for stage in stages]


async def test_explanation_names_every_candidate_and_the_winner() -> None:
    async with fake_workers(prefill=2, decode=2) as workers, router_on(workers) as router:
        request = make_request([4, 5, 6], 2)
        await run(router, request)
        explained = router.explain(request.request_id)
        assert explained is not None
        decisions = explained["decisions"]
        assert isinstance(decisions, list)
        candidates = decisions[0]["candidates"]
        assert {each["worker"] for each in candidates} == {each.address for each in workers}
        for part, chosen in (("prefill", "prefill"), ("decode", "decode")):
            costs = {e["worker"]: e["cost_s"] for e in candidates if e["part"] == part}
            assert costs[decisions[0][chosen]] == min(costs.values())
        assert router.explain("unknown") is None


async def test_requests_queue_while_workers_have_enough_to_do() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers, max_backlog_s=1) as router:
        workers[0].backlog_tokens = 20_000
        workers[0].tell_load()
        await until(lambda: router.backlog_s > 1)
        request = make_request([5], 4)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(run(router, request))
            await until(lambda: router.explain(request.request_id))
            assert not workers[0].submits
            workers[0].backlog_tokens = 0
            workers[0].tell_load()
        assert waiting.result() == expected([5], 4)


async def test_queued_request_does_not_wait_for_workers_that_are_gone() -> None:
    async with (
        fake_workers(decode=1) as workers,
        router_on(workers, max_backlog_s=1, no_worker_grace_s=0.1) as router,
    ):
        workers[0].backlog_tokens = 20_000
        workers[0].tell_load()
        await until(lambda: router.backlog_s > 1)
        request = make_request([5], 4)
        task = asyncio.create_task(run(router, request))
        await until(lambda: router.explain(request.request_id))
        await workers[0].stop()
        with pytest.raises(UnavailableError, match=r"Waited 0.1 s"):
            await task


async def test_request_that_would_come_too_late_is_refused_with_the_predicted_wait() -> None:
    async with fake_workers(decode=1) as workers, router_on(workers) as router:
        workers[0].backlog_tokens = 60_000
        workers[0].tell_load()
        await until(lambda: router.backlog_s > 25)
        with pytest.raises(OverloadedError, match="longer than it has left") as caught:
            await run(router, make_request([5], timeout_s=20))
        assert 20 < caught.value.retry_after_s <= 30
        assert not workers[0].submits
