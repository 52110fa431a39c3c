"""When a rank is lost: one clear error within the deadline, and no process stays."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError, DiptychError, ErrorCode
from core.sampling import SamplingParams
from engine.build import build_executor
from engine.config import EngineConfig
from engine.executor import Executor, ExecutorLostError
from engine.parallel.executor import MultiProcessExecutor
from engine.parallel.meeting import Meeting, start_message
from engine.parallel.pipe import Frame, RankPipe
from engine.parallel.torch_group import make_store_fd
from engine.plan import Chunk, SampleSpec, StepPlan
from tests.support.models import make_checkpoint
from tests.support.process import alive, descendants, frozen, wait_until

TIMEOUT_S = 1.0
SLACK_S = 6.0
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def config(checkpoint: Path, size: int) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint),
        num_blocks=64,
        num_threads=1,
        tensor_parallel_size=size,
        rank_timeout_s=TIMEOUT_S,
        start_timeout_s=60.0,
    )


@pytest.fixture
def executor(checkpoint: Path) -> Iterator[MultiProcessExecutor]:
    built = build_executor(config(checkpoint, 2))
    assert isinstance(built, MultiProcessExecutor)
    yield built
    built.close()


@pytest.mark.gpu
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_collectives_on_gpus_too(tmp_path: Path, number: signal.Signals) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = make_checkpoint(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    executor = build_executor(replace(config(path, 2), device="cuda:0", dtype="bfloat16"))
    assert isinstance(executor, MultiProcessExecutor)
    pids = executor.pids
    step(executor)
    os.kill(pids[0], number)
    started = time.monotonic()
    steps_until_error(executor)
    assert time.monotonic() - started < TIMEOUT_S + SLACK_S
    assert_final(executor, pids, "restart the worker")


def step(executor: Executor, token_id: int = 5) -> int | None:
    chunk = Chunk("a", [token_id] * 20, 0, [3, 1], SampleSpec(GREEDY, 0, (), ()))
    return executor.submit(StepPlan([chunk])).wait().token_ids[0]


def steps_until_error(executor: Executor) -> DiptychError:
    try:
        while True:
            step(executor)
    except ExecutorLostError as error:
        return error


def assert_final(executor: MultiProcessExecutor, pids: list[int], said: str) -> None:
    with pytest.raises(ExecutorLostError, match=said) as raised:
        step(executor)
    assert raised.value.retryable
    assert "restart the worker" in raised.value.message
    executor.close()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_rank_ends_the_step_under_way(
    executor: MultiProcessExecutor, number: signal.Signals
) -> None:
    pids = executor.pids
    step(executor)
    started = time.monotonic()
    killer = threading.Timer(0.1, os.kill, (pids[0], number))
    killer.start()
    error = steps_until_error(executor)
    killer.join()
    assert time.monotonic() - started < SLACK_S
    assert f"Rank 1 (pid {pids[0]}) was ended by signal {number.name}" in error.message
    assert_final(executor, pids, number.name)


def test_a_rank_that_stands_still_is_given_up_within_the_deadline(
    executor: MultiProcessExecutor,
) -> None:
    pids = executor.pids
    step(executor)
    started = time.monotonic()
    with frozen(pids[0]):
        error = steps_until_error(executor)
        assert TIMEOUT_S <= time.monotonic() - started < TIMEOUT_S + SLACK_S
        assert "stood still for 1.0 s" in error.message
        assert_final(executor, pids, "stood still")


def test_a_rank_that_dies_while_nothing_runs_is_noticed(executor: MultiProcessExecutor) -> None:
    pids = executor.pids
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: executor._ranks._error, SLACK_S, "the watch to notice")
    assert_final(executor, pids, "SIGKILL")


def test_a_step_that_fails_on_one_rank_alone_is_the_last(executor: MultiProcessExecutor) -> None:
    pids = executor.pids
    step(executor)
    # Block 64 is beyond the pool, which every rank notices by itself and in its own time.
    bad = Chunk("b", [5] * 20, 0, [64, 65], SampleSpec(GREEDY, 0, (), ()))
    with pytest.raises(ExecutorLostError, match="rank"):
        executor.submit(StepPlan([bad])).wait()
    assert_final(executor, pids, "out of step")


def test_close_ends_the_ranks_in_order_and_is_idempotent(checkpoint: Path) -> None:
    executor = build_executor(config(checkpoint, 2))
    assert isinstance(executor, MultiProcessExecutor)
    processes = [child.process for child in executor._ranks._children]
    step(executor)
    executor.close()
    executor.close()
    assert [process.returncode for process in processes] == [0]


_PARENT = """
import sys
from engine.build import build_executor
from engine.config import EngineConfig
from engine.plan import Chunk, SampleSpec, StepPlan
from core.sampling import SamplingParams
executor = build_executor(
    EngineConfig(model=sys.argv[1], num_blocks=64, num_threads=1, tensor_parallel_size=3)
)
spec = SampleSpec(SamplingParams(temperature=0), 0, (), ())
print("ready", flush=True)
while True:
    executor.submit(StepPlan([Chunk("a", [5] * 20, 0, [3, 1], spec)])).wait()
"""


def test_ranks_end_with_a_parent_that_is_killed_even_inside_a_collective(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        tmp_path, num_attention_heads=3, num_key_value_heads=3, hidden_size=48
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(checkpoint)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == "ready\n"
        ranks = descendants(parent.pid)
        assert len(ranks) == 2
        with frozen(ranks[0]):  # so that the other one waits for it in a collective
            parent.kill()
            parent.wait(SLACK_S)
            wait_until(lambda: not alive(ranks[1]), SLACK_S, "the waiting rank to end")
        wait_until(lambda: not alive(ranks[0]), SLACK_S, "the frozen rank to end")
    finally:
        parent.kill()
        parent.stdout.close()
        parent.wait()


def test_a_rank_that_waits_for_others_ends_when_its_pipe_does(checkpoint: Path) -> None:
    ours, theirs = socket.socketpair()
    store_fd = make_store_fd()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.parallel.rank", str(theirs.fileno())],
            pass_fds=(theirs.fileno(), store_fd),
        )
    try:
        pipe = RankPipe(ours)
        pipe.send(Frame.START, start_message(config(checkpoint, 2), 1, Meeting(store_fd=store_fd)))
        arrived = Path(f"/proc/self/fd/{store_fd}")
        wait_until(lambda: arrived.stat().st_size, 30, "the rank to wait for rank 0")
        pipe.close()
        assert process.wait(SLACK_S) == 3
    finally:
        process.kill()
        process.wait()
        os.close(store_fd)


def test_a_rank_that_can_not_load_says_why(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.parallel import start

    def other_format(config: EngineConfig, rank: int, meeting: Meeting) -> bytes:
        return original(config, rank, meeting).replace(b'"auto"', b'"gguf"', 1)

    original = start.start_message
    monkeypatch.setattr(start, "start_message", other_format)
    with pytest.raises(DiptychError, match=r"Rank 1 failed: --load-format gguf") as raised:
        build_executor(config(checkpoint, 2))
    assert raised.value.code is ErrorCode.CONFIG
    assert not descendants(os.getpid())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel_size": 3}, "4 attention heads and 2 KV heads; it can be 1, 2, 4"),
        ({"tensor_parallel_size": 8}, "4 attention heads; it can be 1, 2, 4"),
        ({"tensor_parallel_size": 0}, "at least 1"),
        ({"tensor_parallel_size": 2, "device": "meta"}, "cpu or cuda"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_before_anything_starts(
    checkpoint: Path, changes: dict[str, object], said: str
) -> None:
    fields = {"model": str(checkpoint), "num_blocks": 64, **changes}
    with pytest.raises(ConfigError, match=said):
        build_executor(EngineConfig(**fields))  # type: ignore[arg-type]
    assert not descendants(os.getpid())
