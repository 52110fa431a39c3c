"""The supervisor on real processes that are a few lines of Python each."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diptych.cluster.logfiles import ChildLog
from diptych.cluster.plan import ChildSpec, Role
from diptych.cluster.supervisor import RestartPolicy, Supervisor, describe_exit
from tests.support.process import alive

STAY = "print('up', os.getpid(), flush=True); signal.pause()"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" + STAY
FAIL = "print('cannot go on', flush=True); sys.exit(3)"
PARENT = """
print('up', os.getpid(), flush=True)
child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])
print('child', child.pid, flush=True)
signal.pause()
"""
TRACE = "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'a').write(sys.argv[2]), "
TRACE += "sys.exit(0)));" + STAY
QUICK = RestartPolicy(first_delay_s=0.01, max_failures=2)
STOP: tuple[tuple[Role, float], ...] = (("router", 1.0), ("decode", 1.0), ("prefill", 1.0))


@dataclass
class Bench:
    """A supervisor and what it said."""

    supervisor: Supervisor
    logs: dict[str, ChildLog]
    told: list[str] = field(default_factory=list)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  # what is awaited is another process
                await asyncio.sleep(0.01)

    async def pid(self, name: str, word: str = "up", nth: int = 1) -> int:
        """The number that a child printed after `word` for the nth time."""

        def found() -> list[int]:
            lines = [line.split() for line in self.logs[name].tail.splitlines()]
            return [int(line[1]) for line in lines if line[0] == word]

        await self.until(lambda: len(found()) >= nth)
        return found()[nth - 1]


def spec(name: str, code: str, *arguments: str) -> ChildSpec:
    role: Role = "router" if name == "router" else "prefill" if "prefill" in name else "decode"
    program = "import os, signal, subprocess, sys\n" + code
    return ChildSpec(
        name=name,
        role=role,
        command=(sys.executable, "-c", program, *arguments),
        env={"PYTHONUNBUFFERED": "1"},
        metrics_url="",
    )


@asynccontextmanager
async def bench(
    folder: Path, *specs: ChildSpec, policy: RestartPolicy = QUICK
) -> AsyncIterator[Bench]:
    told: list[str] = []
    logs = [(one, ChildLog(one.name, folder, lambda *_: None)) for one in specs]
    supervisor = Supervisor(logs, policy=policy, tell=told.append)
    try:
        yield Bench(supervisor, {one.name: log for one, log in logs}, told)
    finally:
        async with asyncio.timeout(20):
            await supervisor.stop(STOP)
        for _, log in logs:
            log.close()


async def test_child_that_is_killed_is_started_again(tmp_path: Path) -> None:
    async with bench(tmp_path, spec("decode-0", STAY)) as b:
        b.supervisor.start()
        first = await b.pid("decode-0")
        b.supervisor.mark_ready()
        os.kill(first, signal.SIGKILL)
        second = await b.pid("decode-0", nth=2)
        assert second != first
        assert any("decode-0 was ended by SIGKILL; starting it again" in t for t in b.told)
    assert not alive(second)


async def test_child_that_ends_before_ready_fails_the_start_with_its_last_words(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, spec("prefill-0", FAIL), spec("router", STAY)) as b:
        b.supervisor.start()
        async with asyncio.timeout(10):
            failure = await b.supervisor.failed()
    assert "prefill-0 ended with status 3, while starting" in str(failure)
    assert "cannot go on" in str(failure)
    assert "router, last lines" not in str(failure)


async def test_crash_loop_is_given_up_after_so_many_failures(tmp_path: Path) -> None:
    async with bench(tmp_path, spec("decode-0", FAIL)) as b:
        b.supervisor.mark_ready()
        b.supervisor.start()
        async with asyncio.timeout(10):
            failure = await b.supervisor.failed()
        assert "3 times in a row" in str(failure)
        assert len(b.told) == QUICK.max_failures


async def test_child_that_had_worked_may_fail_any_number_of_times(tmp_path: Path) -> None:
    policy = RestartPolicy(first_delay_s=0.01, max_failures=1, steady_after_s=0.0)
    async with bench(tmp_path, spec("decode-0", FAIL), policy=policy) as b:
        b.supervisor.mark_ready()
        b.supervisor.start()
        await b.until(lambda: len(b.told) >= 4)


async def test_program_that_is_not_there_fails_the_start(tmp_path: Path) -> None:
    absent = ChildSpec(
        name="router", role="router", command=(str(tmp_path / "no"),), env={}, metrics_url=""
    )
    async with bench(tmp_path, absent) as b:
        b.supervisor.start()
        async with asyncio.timeout(10):
            assert "could not be started" in str(await b.supervisor.failed())


async def test_children_end_router_first_prefill_last(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    names = ("prefill-0", "decode-0", "router")
    async with bench(tmp_path, *(spec(n, TRACE, str(trace), f"{n} ") for n in names)) as b:
        b.supervisor.start()
        for name in names:
            await b.pid(name)
        await b.supervisor.stop(STOP)
    assert trace.read_text().split() == ["router", "decode-0", "prefill-0"]


async def test_child_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    async with bench(tmp_path, spec("decode-0", STUBBORN)) as b:
        b.supervisor.start()
        pid = await b.pid("decode-0")
        await b.supervisor.stop((("decode", 0.1),))
        assert not alive(pid)
        assert any("decode-0 did not end" in line for line in b.told)


async def test_frozen_child_is_killed_at_the_end(tmp_path: Path) -> None:
    async with bench(tmp_path, spec("prefill-0", STAY)) as b:
        b.supervisor.start()
        pid = await b.pid("prefill-0")
        os.kill(pid, signal.SIGSTOP)
        await b.supervisor.stop((("prefill", 0.1),))
        assert not alive(pid)


async def test_what_a_child_started_does_not_outlive_it(tmp_path: Path) -> None:
    async with bench(tmp_path, spec("decode-0", PARENT)) as b:
        b.supervisor.start()
        first = await b.pid("decode-0", "child")
        b.supervisor.mark_ready()
        os.kill(await b.pid("decode-0"), signal.SIGKILL)
        second = await b.pid("decode-0", "child", nth=2)
        assert not alive(first)
    await b.until(lambda: not alive(second))


async def test_stop_during_the_pause_before_a_restart_is_immediate(tmp_path: Path) -> None:
    policy = RestartPolicy(first_delay_s=60.0, max_delay_s=60.0)
    async with bench(tmp_path, spec("decode-0", FAIL), policy=policy) as b:
        b.supervisor.mark_ready()
        b.supervisor.start()
        await b.until(lambda: len(b.told) == 1)
        async with asyncio.timeout(2):
            await b.supervisor.stop(STOP)


async def test_stop_right_after_start_leaves_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path, spec("decode-0", STUBBORN), spec("router", STUBBORN)) as b:
        b.supervisor.start()
        await asyncio.sleep(0)
        await b.supervisor.stop((("router", 0.1), ("decode", 0.1)))
    for name in ("router", "decode-0"):
        for line in b.logs[name].tail.splitlines():
            assert not alive(int(line.split()[1]))


async def test_endless_line_does_not_end_the_reading(tmp_path: Path) -> None:
    code = "print('x' * 3_000_000); print('up 1', flush=True); signal.pause()"
    async with bench(tmp_path, spec("router", code)) as b:
        b.supervisor.start()
        assert await b.pid("router") == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with status 0"), (-9, "was ended by SIGKILL"), (-200, "was ended by signal 200")],
)
def test_ends_are_put_into_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


def test_pauses_grow_to_a_limit_and_then_it_is_given_up() -> None:
    policy = RestartPolicy(first_delay_s=1.0, max_delay_s=3.0, max_failures=4)
    assert [policy.delay_s(n) for n in range(6)] == [1.0, 1.0, 2.0, 3.0, 3.0, None]
