"""Workers that are listed, listed otherwise and listed no longer while requests run."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from core.errors import UnavailableError
from router.dispatch import Dispatcher
from router.fleet.discovery import Member, Members
from router.fleet.fleet import Fleet
from router.fleet.worker import Place, Role, WorkerState
from router.main import dispatcher_on_fleet
from router.settings import RouterSettings
from rpc.v1 import worker_pb2
from tests.support.fake_sequence import expected
from tests.support.fake_worker import FakeWorker, fake_workers, until
from tests.support.process import free_port
from tests.support.router_fleet import collect, make_request, run

DECODE = Member(role=Role.DECODE, pool="d")
DRAINING = Member(role=Role.DECODE, pool="d", draining=True)


class Script:
    """A Discovery that a test speaks through."""

    shortage = "The test has listed none."
    members: Members

    async def run(self, members: Members) -> None:
        self.members = members
        await asyncio.Event().wait()


@asynccontextmanager
async def scripted(
    listed: Sequence[FakeWorker],
) -> AsyncIterator[tuple[Members, Fleet, Dispatcher]]:
    """A router that knows these workers, and where to tell it of others."""
    script = Script()
    settings = RouterSettings(reconnect_max_s=0.1, no_worker_grace_s=5.0)
    started = dispatcher_on_fleet(settings, CollectorRegistry(), None, script)
    async with started as (dispatcher, fleet):
        await until(lambda: hasattr(script, "members"))
        for worker in listed:
            script.members.add(worker.address, DECODE)
        await until(lambda: len(ready(fleet)) == len(listed), "all workers attached")
        yield script.members, fleet, dispatcher


def ready(fleet: Fleet) -> set[str]:
    return {each.address for each in fleet.statuses if each.state is WorkerState.READY}


async def test_worker_that_is_listed_later_takes_requests() -> None:
    async with fake_workers(decode=1) as (worker,), scripted([]) as (members, fleet, router):
        assert not router.ready
        with pytest.raises(UnavailableError, match="The test has listed none"):
            _ = router.model
        members.add(worker.address, DECODE)
        await until(lambda: router.ready)
        assert await run(router, make_request([1, 2], 5)) == expected([1, 2], 5)
        (about,) = fleet.describe()
        assert (about["pool"], about["state"]) == ("d", "ready")


async def test_removed_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with fake_workers(decode=2) as (a, b), scripted([a]) as (members, fleet, router):
        a.running = False
        request = make_request([1, 2], 30)
        async with router.generate(request) as generation:
            await until(lambda: a.busy)
            members.add(b.address, DECODE)
            await until(lambda: b.address in ready(fleet))
            members.remove(a.address)
            outputs = await asyncio.gather(
                *(run(router, make_request([i, 5], 4)) for i in range(6))
            )
            assert outputs == [expected([i, 5], 4) for i in range(6)]
            assert len(a.submits) == 1 and len(b.submits) == 6
            assert a.busy, "its request was taken away"
            a.running = True
            assert await collect(generation) == expected([1, 2], 30)
        timeline = router.timeline(request.request_id)
        assert timeline is not None and len(timeline["attempts"]) == 1  # type: ignore[arg-type]
        await until(lambda: {each.address for each in fleet.statuses} == {b.address}, "it to go")
        await until(lambda: not a.attached, "its stream to end")


async def test_draining_worker_keeps_its_session_and_can_come_back() -> None:
    async with fake_workers(decode=2) as (a, b), scripted([a, b]) as (members, fleet, router):
        members.update(a.address, DRAINING)
        for i in range(6):
            await run(router, make_request([i, 5], 3))
        assert not a.submits and len(b.submits) == 6
        assert a.attached and {each.state for each in fleet.statuses} == {"draining", "ready"}
        members.update(a.address, DECODE)
        members.update(b.address, DRAINING)
        await until(lambda: ready(fleet) == {a.address})
        await run(router, make_request([7], 3))
        assert len(a.submits) == 1 and a.attaches == 1


async def test_worker_listed_again_while_it_ends_keeps_its_session() -> None:
    async with fake_workers(decode=1) as (a,), scripted([a]) as (members, _fleet, router):
        a.running = False
        async with router.generate(make_request([1, 2], 10)) as generation:
            await until(lambda: a.busy)
            members.remove(a.address)
            assert not router.ready
            members.add(a.address, DECODE)
            await until(lambda: router.ready)
            a.running = True
            assert await collect(generation) == expected([1, 2], 10)
        assert await run(router, make_request([3], 4)) == expected([3], 4)
        assert a.attaches == 1


async def test_worker_nobody_reached_is_forgotten_at_once() -> None:
    async with fake_workers(decode=1) as (a,), scripted([a]) as (members, fleet, router):
        nowhere = f"127.0.0.1:{free_port()}"
        members.add(nowhere, DECODE)
        await until(lambda: "unavailable" in str(fleet.absent.get(nowhere)))
        members.remove(nowhere)
        assert not fleet.absent
        address = a.address
        await a.stop()
        await until(lambda: not router.ready)
        members.remove(address)
        members.add(address, DECODE)
        a.epoch += 1
        await a.start()
        await until(lambda: router.ready)
        assert await run(router, make_request([3], 4)) == expected([3], 4)


async def test_why_a_worker_is_not_reached_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "router.fleet.link")
    async with scripted([]) as (members, _, _):
        members.add(f"127.0.0.1:{free_port()}", DECODE)
        tried = "is not reached: unavailable"
        await until(lambda: sum(tried in each.message for each in caplog.records) > 2)
    levels = [each.levelname for each in caplog.records if tried in each.message]
    assert levels[0] == "INFO"
    assert levels.count("INFO") < len(levels)


async def test_what_a_worker_says_of_its_place_wins_over_where_it_is_listed() -> None:
    async with fake_workers(decode=1) as (a,), scripted([]) as (members, fleet, router):
        a.place = worker_pb2.Place(zone="own")
        listed = Place(zone="z1", host="n1")
        members.add(a.address, Member(role=Role.DECODE, place=listed))
        await until(lambda: router.ready)
        info = fleet.info(a.address)
        assert info is not None and info.place == Place(zone="own", host="n1")


async def test_worker_of_another_protocol_is_left_alone_until_it_is_updated() -> None:
    """Halfway through an update nobody misreads anybody: a router waits for workers of its own."""
    async with fake_workers(decode=1) as (a,), scripted([]) as (members, fleet, router):
        a.protocol += 1
        members.add(a.address, Member(role=Role.DECODE))
        await until(lambda: "same version" in fleet.absent.get(a.address, ""), "it is refused")
        assert not router.ready and not a.submits
        a.protocol -= 1
        await until(lambda: router.ready)
        assert await run(router, make_request([3], 4)) == expected([3], 4)
