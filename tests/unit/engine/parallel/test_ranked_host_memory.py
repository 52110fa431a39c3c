from dataclasses import dataclass, field

import pytest

from core.errors import DiptychError
from engine.parallel.host_memory import RankCopies, RankedHostMemory
from engine.parallel.pipe import Frame
from tests.support.fake_executor import FakePool
from tests.support.host_memory import FakeHostMemory


class Rank:
    """A pool of four blocks of its own numbers, and host memory below it."""

    def __init__(self, first: int) -> None:
        self.pool = FakePool(4, 2)
        for index, block in enumerate(self.pool.blocks):
            block[:] = [first + index] * 2
        self.memory = FakeHostMemory(self.pool.blocks, 4)

    @property
    def content(self) -> list[int]:
        return [block[0] for block in self.pool.blocks]


@dataclass
class Pipe:
    """Brings frames to the other rank when told to."""

    copies: RankCopies
    frames: list[tuple[Frame, bytes]] = field(default_factory=list)

    def send(self, kind: Frame, body: bytes) -> None:
        self.frames.append((kind, body))

    def deliver(self) -> None:
        frames, self.frames = self.frames, []
        for kind, body in frames:
            self.copies.obey(kind, body)


def joined(timeout_s: float = 5.0) -> tuple[Rank, Rank, Pipe, RankedHostMemory]:
    first, second = Rank(10), Rank(20)
    pipe = Pipe(RankCopies(second.memory, timeout_s))
    return first, second, pipe, RankedHostMemory(first.memory, pipe, 2)


def test_every_rank_copies_its_own_content_to_the_same_places() -> None:
    first, second, pipe, memory = joined()
    assert memory.block_bytes == 2 * first.memory.block_bytes
    saved = memory.save([3, 1], [0, 2])
    assert saved.poll() is not None
    pipe.deliver()
    loaded = memory.load([2, 0], [0, 1])
    assert loaded.poll() is not None and loaded.poll() is not None
    pipe.deliver()
    assert first.content == [11, 13, 12, 13]
    assert second.content == [21, 23, 22, 23]


def test_a_rank_goes_on_only_when_its_copy_has_ended_as_well() -> None:
    _, second, pipe, memory = joined()
    saved = memory.save([3], [0])
    second.memory.delay = 5
    assert saved.poll() is not None
    loaded = memory.load([0], [0])
    pipe.deliver()
    assert second.content[0] != 23, "only started"
    assert loaded.poll() is not None
    pipe.deliver()
    assert second.content[0] == 23


def test_a_copy_that_does_not_end_ends_the_rank() -> None:
    _, second, pipe, memory = joined(timeout_s=0.01)
    second.memory.delay = 1_000_000
    assert memory.save([3], [0]).poll() is not None
    with pytest.raises(DiptychError, match="took over"):
        pipe.deliver()
