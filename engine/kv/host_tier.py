"""The tier below the pool: which hashes lie in host memory, and which blocks should get there next.

Pure bookkeeping, in the engine loop's thread. `PrefixCache` tells it what becomes of cached blocks
of the pool; `TierCopies` asks it what to copy and tells it what was copied. Blocks are saved while
they are still cached in the pool, the ones next to be evicted first, so that evicting one costs
nothing; a copy counts only if its block stayed idle from its start to its end, so a block may be
reused at any moment.

Invariants: every host block is in exactly one state, free, cached (its hash can be matched) or held
(a copy reads or writes it). A hash that is cached here is not in the pool, or only on a block that
is idle there; once that is used again, or the hash is registered anew, the copy here goes.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Saving:
    """A block on its way from the pool to host memory."""

    block_id: int
    """In the pool."""
    host_id: int
    block_hash: bytes
    void: bool = False
    """True once the block in the pool may have changed: what arrives is nobody's."""


class HostTier:
    """Hands out the blocks of host memory, by id in [0, num_blocks)."""

    def __init__(self, num_blocks: int, *, window: int) -> None:
        """Reserve nothing; the memory is somebody else's.

        Args:
            num_blocks: in host memory.
            window: blocks that the pool should be able to hand out without losing content. Larger
                ones survive larger bursts, and keep more hashes in both places.
        """
        self._num_blocks = num_blocks
        # Copies of blocks that are still in the pool must leave room for those that are not.
        self._window = max(1, min(window, num_blocks // 2))
        self._free = list(range(num_blocks - 1, -1, -1))
        self._host_of: OrderedDict[bytes, int] = OrderedDict()
        self._loading: dict[bytes, int] = {}
        self._unsaved: OrderedDict[int, bytes] = OrderedDict()
        self._saving: dict[int, Saving] = {}
        self._saved: dict[int, bytes] = {}
        self._saved_on: dict[bytes, int] = {}
        self._num_savings = 0
        self._stored: set[bytes] = set()
        self._removed: set[bytes] = set()
        self.num_lost = 0
        """Blocks that the pool gave up before they were saved."""

    @property
    def num_blocks(self) -> int:
        """Blocks in host memory."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without content worth keeping."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that a match can find."""
        return len(self._host_of)

    @property
    def num_held(self) -> int:
        """Blocks that a copy reads or writes."""
        return self._num_savings + len(self._loading)

    def registered(self, block_hash: bytes) -> None:
        """The pool has this hash on a block in use."""
        self._drop(block_hash)

    def became_idle(self, block_id: int, block_hash: bytes) -> None:
        """Nobody holds this block of the pool any more; in time it should be saved."""
        self._unsaved[block_id] = block_hash

    def became_held(self, block_id: int) -> None:
        """An idle block is in use again, far from being evicted."""
        if self._unsaved.pop(block_id, None) is None and not self._void(block_id):
            block_hash = self._saved.get(block_id)
            if block_hash is not None:
                self._drop(block_hash)

    def evicted(self, block_id: int, *, wanted: bool = True) -> None:
        """The pool gave an idle block up; if it was saved, this is the only place left.

        Args:
            block_id: in the pool.
            wanted: False if its content was to go, and not to make room.
        """
        block_hash = self._saved.pop(block_id, None)
        if block_hash is not None:
            del self._saved_on[block_hash]
        else:
            if self._unsaved.pop(block_id, None) is None:
                self._void(block_id)
            self.num_lost += wanted

    def begin_savings(self, num_free: int, most: int) -> list[Saving]:
        """Choose blocks of the pool to save now; tell `end_saving` of each.

        Args:
            num_free: blocks of the pool that are free.
            most: to choose.
        """
        safe = num_free + len(self._saved) + len(self._saving)
        chosen: list[Saving] = []
        while len(chosen) < min(most, self._window - safe) and self._unsaved:
            if not self._free and not self._host_of:
                break  # copies under way hold all there is
            block_id, block_hash = self._unsaved.popitem(last=False)
            if not self._free:
                # Its descendants came before it, so they went before it.
                self._evict(next(iter(self._host_of)))
            saving = Saving(block_id, self._free.pop(), block_hash)
            self._saving[block_id] = saving
            chosen.append(saving)
        self._num_savings += len(chosen)
        return chosen

    def end_saving(self, saving: Saving, *, copied: bool) -> None:
        """A copy out has ended, well or not. Void ones are dropped."""
        self._num_savings -= 1
        block_id, block_hash = saving.block_id, saving.block_hash
        if not saving.void:
            del self._saving[block_id]
            if copied and block_hash not in self._loading:
                self._host_of[block_hash] = saving.host_id
                self._saved[block_id] = block_hash
                self._saved_on[block_hash] = block_id
                self._note(block_hash, gained=True)
                return
            self._unsaved[block_id] = block_hash
        self._free.append(saving.host_id)

    def has(self, block_hash: bytes) -> bool:
        """True if the hash can be loaded."""
        return block_hash in self._host_of

    def begin_loading(self, hashes: Iterable[bytes]) -> list[int]:
        """Hold the blocks of hashes that `has` found and that the pool has not."""
        host_ids = []
        for block_hash in hashes:
            assert block_hash not in self._saved_on, "the pool has this hash"
            host_id = self._host_of.pop(block_hash)
            self._loading[block_hash] = host_id
            host_ids.append(host_id)
        return host_ids

    def end_loading(self, hashes: Iterable[bytes]) -> None:
        """They are in the pool, or can't get there; either way this tier has them no more."""
        for block_hash in hashes:
            self._free.append(self._loading.pop(block_hash))
            self._note(block_hash, gained=False)

    def flush(self) -> int:
        """Forget everything that no load holds. Returns how many blocks became free."""
        freed = len(self._host_of)
        for block_hash in list(self._host_of):
            self._evict(block_hash)
        for block_id, saving in list(self._saving.items()):
            self._void(block_id)
            self._unsaved[block_id] = saving.block_hash
        return freed

    def drain_changes(self) -> tuple[Sequence[bytes], Sequence[bytes]]:
        """Hashes gained and lost since the last call."""
        stored, removed = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def hashes(self) -> list[bytes]:
        """Every hash that is here, those on their way to the pool included."""
        return [*self._host_of, *self._loading]

    def check_integrity(self, idle: Iterable[int]) -> None:
        """Assert that every host block, and every idle block of the pool, is in one state."""
        assert self.num_free + self.num_cached + self.num_held == self._num_blocks
        known = [*self._free, *self._host_of.values(), *self._loading.values()]
        known += [saving.host_id for saving in self._saving.values()]
        assert len(set(known)) == len(known), "a host block is in two states"
        assert len(self._saving) <= self._num_savings
        states = [*self._unsaved, *self._saving, *self._saved]
        assert sorted(states) == sorted(idle), "an idle block is unknown, or a known one not idle"
        assert self._saved == {block_id: key for key, block_id in self._saved_on.items()}
        assert self._saved_on.keys() <= self._host_of.keys(), "a saved block has no copy"

    def _void(self, block_id: int) -> bool:
        saving = self._saving.pop(block_id, None)
        if saving is None:
            return False
        saving.void = True
        return True

    def _evict(self, block_hash: bytes) -> None:
        block_id = self._saved_on.get(block_hash)
        self._drop(block_hash)
        if block_id is not None:
            self._unsaved[block_id] = block_hash

    def _drop(self, block_hash: bytes) -> None:
        host_id = self._host_of.pop(block_hash, None)
        if host_id is None:
            return
        self._free.append(host_id)
        block_id = self._saved_on.pop(block_hash, None)
        if block_id is not None:
            del self._saved[block_id]
        self._note(block_hash, gained=False)

    def _note(self, block_hash: bytes, *, gained: bool) -> None:
        here, there = self._stored, self._removed
        if not gained:
            here, there = there, here
        if block_hash in there:
            there.remove(block_hash)
        else:
            here.add(block_hash)
