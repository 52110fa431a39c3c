"""What shares the ranks' processes with the engine: its messages pass while steps run."""

import threading
import time
from pathlib import Path

import pytest

from core.errors import DiptychError
from core.sampling import SamplingParams
from engine.build import build_executor
from engine.config import EngineConfig
from engine.executor import ExecutorLostError, OtherRanks
from engine.parallel import other_ranks
from engine.parallel.other_ranks import PipesToRanks
from engine.parallel.pipe import Frame, PipeClosedError
from engine.plan import Chunk, SampleSpec, StepPlan
from tests.support.models import make_checkpoint
from tests.support.process import wait_until


def echoes(ranks: OtherRanks, count: int) -> list[tuple[int, bytes]]:
    heard: list[tuple[int, bytes]] = []
    deadline = time.monotonic() + 10
    while len(heard) < count and time.monotonic() < deadline:
        heard += ranks.receive(1.0)
    return heard


def test_messages_pass_between_steps_and_the_side_may_end_the_engine(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path)),
        num_blocks=16,
        num_threads=1,
        tensor_parallel_size=2,
        rank_timeout_s=5.0,
    )
    executor = build_executor(config, rank_module="tests.support.side_rank")
    try:
        ranks = executor.ranks
        assert ranks is not None and ranks.count == 1
        prefix = f"1 {executor.pool.layout.block_bytes} ".encode()
        spec = SampleSpec(SamplingParams(temperature=0), 0, (), ())
        plan = StepPlan([Chunk("a", [5] * 20, 0, [3, 1], spec)])
        for number in range(3):
            step = executor.submit(plan)
            ranks.send(b"%d" % number)
            ranks.send(b"x" * 100_000)
            step.wait()
        heard = echoes(ranks, 6)
        wanted = [prefix + text for number in b"012" for text in (bytes([number]), b"x" * 100_000)]
        assert heard == [(1, text) for text in wanted]
        assert ranks.receive() == []
        ranks.send(b"fail")
        wait_until(lambda: _is_lost(ranks), 10, "the failure to arrive")
        with pytest.raises(ExecutorLostError, match="Rank 1 failed: the side has had enough"):
            executor.submit(plan)
    finally:
        executor.close()


def _is_lost(ranks: OtherRanks) -> bool:
    try:
        ranks.receive()
    except ExecutorLostError:
        return True
    return False


class Children:
    """Implements other_ranks.Ranks."""

    count = 2

    def __init__(self) -> None:
        self.error: DiptychError | None = None
        self.sent: list[tuple[Frame, bytes]] = []
        self.takes = True

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def send(self, kind: Frame, body: bytes) -> None:
        if not self.takes:
            raise PipeClosedError("full")
        self.sent.append((kind, body))

    def fail(self, reason: str) -> None:
        self.error = self.error or ExecutorLostError(reason)


@pytest.fixture
def children() -> Children:
    return Children()


@pytest.fixture
def changed() -> threading.Condition:
    return threading.Condition()


@pytest.fixture
def pipes(children: Children, changed: threading.Condition) -> PipesToRanks:
    return PipesToRanks(children, changed)


def test_what_the_watch_saw_is_told_before_a_send_that_failed(
    children: Children, pipes: PipesToRanks, changed: threading.Condition
) -> None:
    def see() -> None:
        with changed:
            children.fail("Rank 1 was ended")
            changed.notify_all()

    children.takes = False
    threading.Timer(0.05, see).start()
    with pytest.raises(ExecutorLostError, match="Rank 1 was ended"):
        pipes.send(b"a")


def test_a_rank_that_takes_no_message_is_lost(
    children: Children, pipes: PipesToRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_ranks, "_VERDICT_S", 0.01)
    pipes.send(b"a")
    assert children.sent == [(Frame.SIDE, b"a")]
    children.takes = False
    for _ in range(2):
        with pytest.raises(ExecutorLostError, match="takes no message"):
            pipes.send(b"b")
    with pytest.raises(ExecutorLostError, match="takes no message"):
        pipes.receive()


def test_receive_waits_for_the_first_message_and_no_longer(pipes: PipesToRanks) -> None:
    assert pipes.receive() == []
    began = time.monotonic()
    assert pipes.receive(0.05) == []
    assert time.monotonic() - began >= 0.05
    threading.Timer(0.05, pipes.take, (2, b"late")).start()
    assert pipes.receive(10) == [(2, b"late")]
    assert time.monotonic() - began < 5


def test_a_rank_that_sends_without_end_is_given_up(
    pipes: PipesToRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_ranks, "_MAX_INBOX", 2)
    for _ in range(3):
        pipes.take(1, b"more")
    with pytest.raises(ExecutorLostError, match="Rank 1 sends more"):
        pipes.receive()


def test_giving_up_raises_the_first_reason(pipes: PipesToRanks) -> None:
    for reason in ("first", "second"):
        with pytest.raises(ExecutorLostError, match="first"):
            pipes.fail(reason)
