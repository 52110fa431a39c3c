"""Host memory below a fake pool, whose copies happen whenever a test lets them."""

from collections.abc import Sequence
from dataclasses import dataclass

POISON = -7
"""What must not be read: slots that a step under way or failed would have written, blocks on their
way back."""


@dataclass
class FakeCopy:
    """A BlockCopy that happens block by block, at any time before its end is seen."""

    targets: list[list[int]]
    sources: list[list[int]]
    polls_left: int
    fails: bool
    done: int = 0

    def run(self, count: int) -> None:
        """Copy up to so many blocks more, as they are now."""
        pairs = list(zip(self.targets, self.sources, strict=True))[self.done :]
        for target, source in pairs[:count]:
            target[:] = source
            self.done += 1

    def poll(self) -> float | None:
        if self.polls_left:
            self.polls_left -= 1
            return None
        if self.fails:
            raise RuntimeError("the copy failed")
        self.run(len(self.targets))
        return 0.001


class FakeHostMemory:
    """Implements `engine.executor.HostMemory`. Targets of a load are spoilt when it starts."""

    def __init__(self, pool_blocks: list[list[int]], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        block_size = len(pool_blocks[0])
        self.block_bytes = 8 * block_size
        self.blocks = [[-1] * block_size for _ in range(num_blocks)]
        self.copies: list[FakeCopy] = []
        self.delay = 0
        """Polls before the end of a copy is seen."""
        self.fails = False
        """Copies started from now on fail."""
        self.refuses = False
        """No copy can be started."""
        self._pool_blocks = pool_blocks

    def save(self, block_ids: Sequence[int], host_ids: Sequence[int]) -> FakeCopy:
        sources = [self._pool_blocks[block_id] for block_id in block_ids]
        return self._start([self.blocks[host_id] for host_id in host_ids], sources)

    def load(self, host_ids: Sequence[int], block_ids: Sequence[int]) -> FakeCopy:
        targets = [self._pool_blocks[block_id] for block_id in block_ids]
        for target in targets:
            target[:] = [POISON] * len(target)
        return self._start(targets, [self.blocks[host_id] for host_id in host_ids])

    def run(self, count: int) -> None:
        """Let the copies under way get on with up to `count` blocks each."""
        for copy in self.copies:
            copy.run(count)

    def close(self) -> None:
        pass

    def _start(self, targets: list[list[int]], sources: list[list[int]]) -> FakeCopy:
        assert len(targets) == len(sources) > 0
        if self.refuses:
            raise RuntimeError("no copy can be started")
        copy = FakeCopy(targets, sources, self.delay, self.fails)
        self.copies = [each for each in self.copies if each.done < len(each.targets)]
        self.copies.append(copy)
        return copy
