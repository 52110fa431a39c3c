"""The prefix cache: which blocks hold which hash, and in what order idle ones are given up.

Owned by `BlockAllocator`, which tells it when a block becomes idle (nobody holds it) or held again.
Hashes chain over their ancestors, so one dict is the whole tree: a prefix is matched by walking the
hashes of a prompt from its start, and a block whose ancestor was evicted can't be reached any more.
Invariant: at most one block per hash; every idle block here is in the eviction order exactly once.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from engine.kv.host_tier import HostTier
from engine.request import CacheChange


class EvictionOrder(Protocol):
    """Decides which idle block is given up next."""

    def add(self, block_id: int) -> None:
        """A block became idle. Of one prefix, descendants are added before their ancestors."""
        ...

    def remove(self, block_id: int) -> None:
        """An idle block is held again."""
        ...

    def pop(self) -> int:
        """Take the block to give up; a descendant should go before its ancestors."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...


class LeastRecentlyUsed:
    """Gives up the block that became idle first.

    An ancestor is held at least as long as its descendants and added after them, so this order
    takes leaves before what they hang on, at O(1) per block and without counting children.

    Source: leaf-first LRU of RadixAttention (arXiv:2312.07104, section 3); the ordering by release
    is PagedAttention's free queue (arXiv:2309.06180) with prefix hashes.
    """

    def __init__(self) -> None:
        self._idle: OrderedDict[int, None] = OrderedDict()

    def add(self, block_id: int) -> None:
        """Put a block last."""
        self._idle[block_id] = None

    def remove(self, block_id: int) -> None:
        """Take a block out, wherever it is."""
        del self._idle[block_id]

    def pop(self) -> int:
        """Take the first block."""
        return self._idle.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self._idle)

    def __iter__(self) -> Iterator[int]:
        return iter(self._idle)


class PrefixCache:
    """Index from block hash to block id, with the idle blocks in eviction order."""

    def __init__(
        self, num_blocks: int, order: EvictionOrder | None = None, tier: HostTier | None = None
    ) -> None:
        """Args: tier is told of what becomes of cached blocks, so that it can have copies."""
        self._order: EvictionOrder = LeastRecentlyUsed() if order is None else order
        self._tier = tier
        self._block_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._stored: set[bytes] = set()
        self._removed: set[bytes] = set()

    @property
    def num_idle(self) -> int:
        """Blocks that can be evicted now."""
        return len(self._order)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `hashes`. Mutates nothing.

        The blocks stay what they are only once they are held.
        """
        blocks = []
        block_of = self._block_of
        for block_hash in hashes:
            block_id = block_of.get(block_hash)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this hash."""
        return self._block_of.get(block_hash)

    def insert(self, block_id: int, block_hash: bytes) -> bool:
        """Register a held block whose tokens are complete.

        Returns:
            False if another block has this hash already: the first stays, and this one is freed
            when its holders release it.
        """
        if block_hash in self._block_of:
            return False
        assert self._hash_of[block_id] is None, f"block {block_id} was registered twice"
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        if block_hash in self._removed:
            self._removed.remove(block_hash)
        else:
            self._stored.add(block_hash)
        if self._tier is not None:
            self._tier.registered(block_hash)
        return True

    def holds(self, block_id: int) -> bool:
        """True if the block is registered under a hash."""
        return self._hash_of[block_id] is not None

    def make_idle(self, block_id: int) -> None:
        """Nobody holds this registered block any more."""
        self._order.add(block_id)
        if self._tier is not None:
            block_hash = self._hash_of[block_id]
            assert block_hash is not None, f"block {block_id} is idle without a hash"
            self._tier.became_idle(block_id, block_hash)

    def make_held(self, block_id: int) -> None:
        """Somebody holds this idle block again."""
        self._order.remove(block_id)
        if self._tier is not None:
            self._tier.became_held(block_id)

    def evict(self) -> int:
        """Forget the idle block that is next in the order and return it."""
        block_id = self._order.pop()
        self._forget(block_id, wanted=True)
        return block_id

    def flush(self) -> list[int]:
        """Forget every idle block and return them."""
        blocks = [self._order.pop() for _ in range(len(self._order))]
        for block_id in blocks:
            self._forget(block_id, wanted=False)
        return blocks

    def drain_changes(self) -> CacheChange:
        """Net change of the set of hashes since the last call."""
        change = CacheChange(stored=tuple(self._stored), removed=tuple(self._removed))
        self._stored = set()
        self._removed = set()
        return change

    def hashes(self) -> list[bytes]:
        """Every hash that a match can find, those of held blocks included."""
        return list(self._block_of)

    def idle_blocks(self) -> list[int]:
        """Idle blocks, next to be evicted first."""
        return list(self._order)

    def check_integrity(self) -> None:
        """Assert that both directions of the index agree."""
        for block_hash, block_id in self._block_of.items():
            assert self._hash_of[block_id] == block_hash, f"block {block_id} lost its hash"
        registered = sum(block_hash is not None for block_hash in self._hash_of)
        assert registered == len(self._block_of), "two blocks are registered under one hash"

    def _forget(self, block_id: int, *, wanted: bool) -> None:
        block_hash = self._hash_of[block_id]
        assert block_hash is not None, f"block {block_id} is idle without a hash"
        self._hash_of[block_id] = None
        del self._block_of[block_hash]
        if block_hash in self._stored:
            self._stored.remove(block_hash)
        else:
            self._removed.add(block_hash)
        if self._tier is not None:
            self._tier.evicted(block_id, wanted=wanted)
