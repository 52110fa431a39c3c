"""Moves blocks between the pool and host memory, beside the steps: which, when, and how it ended.

Called by `Engine` (tend, flush) and, for sequences about to be admitted, by `BlockTables` (fetch).
A load belongs to nobody: it holds the blocks it fills and what precedes them in their prompt, and
when it ends they are cached blocks like any other. So whoever waited for it, was aborted meanwhile
or comes later finds them by an ordinary match, and nothing has to be undone.

Invariants: no step reads a block before its load was seen to have ended, and no copy of a block
counts that was not idle all the while. Nobody waits for a load longer than MAX_WAIT_S, nor for two
on behalf of the same blocks: a sequence gets one, then it computes what is missing.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from core.clock import Clock
from engine.executor import BlockCopy, HostMemory
from engine.kv.allocator import BlockAllocator
from engine.kv.host_tier import HostTier, Saving
from engine.rates import CopyRate, StepRates
from engine.request import HostTierStats

MAX_WAIT_S = 2.0
"""Longest that a sequence waits for a load. Own judgement: 64 GiB take as long over PCIe 5."""
MAX_SAVES = 2
"""Batches of copies out under way: one is copied while the next one is queued."""
SAVED_STEPS = 4
"""As many of the largest steps can evict blocks before copies out must catch up. Own judgement:
copying what a step fills takes a fraction of the step."""
_MAX_REMEMBERED = 4096
"""Requests that were given a load and have not been admitted; more are forgotten."""


@dataclass(slots=True, eq=False)
class _Save:
    savings: Sequence[Saving]
    copy: BlockCopy


@dataclass(slots=True, eq=False)
class _Load:
    copy: BlockCopy
    started_at: float
    hashes: Sequence[bytes]
    block_ids: Sequence[int]
    """Where they go, aligned with `hashes`."""
    held: Sequence[int]
    """block_ids and what precedes them, in table order; each with a reference of this load."""
    flushed: bool = False


class TierCopies:
    """The copies of one engine."""

    def __init__(
        self,
        blocks: BlockAllocator,
        tier: HostTier,
        memory: HostMemory,
        *,
        block_size: int,
        batch: int,
        rates: StepRates,
        clock: Clock,
    ) -> None:
        """Join the parts.

        Args:
            blocks: of the pool, told of `tier`.
            tier: bookkeeping of `memory`.
            memory: of the executor.
            block_size: tokens per block.
            batch: most blocks in one copy out.
            rates: of the engine's steps.
            clock: in seconds.
        """
        self._blocks = blocks
        self._tier = tier
        self._memory = memory
        self._block_size = block_size
        self._batch = batch
        self._rates = rates
        self._clock = clock
        self._log = logging.getLogger(__name__)
        self._saves: list[_Save] = []
        self._loads: list[_Load] = []
        self._load_of: dict[bytes, _Load] = {}
        self._fetched: dict[str, None] = {}
        self._rate = CopyRate()
        self._broken = False
        self._hit_tokens = 0
        self._saved_blocks = 0
        self._loaded_blocks = 0

    @property
    def num_loads(self) -> int:
        """Loads that somebody may be waiting for."""
        return sum(map(self._in_time, self._loads))

    def tend(self) -> bool:
        """Take in copies that have ended, and start those out that are due.

        Returns:
            True if a load has ended, so that blocks have become available.
        """
        ended = [load for load in self._loads if self._has_ended(load.copy, len(load.hashes))]
        for load in ended:
            self._end_load(load)
        for save in [save for save in self._saves if self._has_ended(save.copy, len(save.savings))]:
            self._saves.remove(save)
            for saving in save.savings:
                self._saved_blocks += not saving.void and not self._broken
                self._tier.end_saving(saving, copied=not self._broken)
        if len(self._saves) < MAX_SAVES and not self._broken:
            self._start_save()
        return bool(ended)

    def fetch(
        self, request_id: str, hashes: Sequence[bytes], matched: Sequence[int], *, busy: bool
    ) -> bool:
        """See that what host memory has of a prompt comes back, if that is worth the wait.

        May take blocks: as many as the prompt needs beyond `matched`, at most.

        Args:
            request_id: whose prompt it is; a request gets one load until `forget`.
            hashes: of the prompt's blocks.
            matched: what the pool has of them.
            busy: other sequences run, so that the end of a load is seen only between steps.

        Returns:
            True if the request should not be admitted now: blocks of it are on their way.
        """
        if len(matched) >= len(hashes) or self._broken:
            return False
        load = self._load_of.get(hashes[len(matched)])
        if load is not None:
            return self._in_time(load)
        if request_id in self._fetched:
            return False
        run = list(self._run(hashes[len(matched) :]))
        missing = [block_hash for block_hash, block_id in run if block_id is None]
        if not missing or not self._pays(len(missing), busy=busy):
            return False
        self._remember(request_id)
        self._start_load(matched, run, missing)
        return not self._broken

    def reachable(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of `hashes` a fetch would find."""
        return sum(1 for _ in self._run(hashes))

    def forget(self, request_id: str) -> None:
        """A request has ended or lost its blocks; under that name another load may be started."""
        self._fetched.pop(request_id, None)

    def flush(self) -> None:
        """What is on its way must not be found when it arrives. Flush the allocator after this."""
        for load in self._loads:
            load.flushed = True
        self._load_of.clear()

    def held_blocks(self) -> Iterator[int]:
        """Blocks of the pool that loads hold, one for each reference."""
        for load in self._loads:
            yield from load.held

    def stats(self) -> HostTierStats:
        """The tier at this moment."""
        tier, block_bytes = self._tier, self._memory.block_bytes
        return HostTierStats(
            total_blocks=tier.num_blocks,
            free_blocks=tier.num_free,
            cached_blocks=tier.num_cached,
            held_blocks=tier.num_held,
            hit_tokens=self._hit_tokens,
            lost_blocks=tier.num_lost,
            saved_bytes=self._saved_blocks * block_bytes,
            loaded_bytes=self._loaded_blocks * block_bytes,
            bytes_per_s=self._rate.bytes_per_s,
        )

    def _run(self, hashes: Sequence[bytes]) -> Iterator[tuple[bytes, int | None]]:
        """Leading hashes that are here or there, with the pool's block where it has one."""
        for block_hash in hashes:
            block_id = self._blocks.find(block_hash)
            if block_id is None and not self._tier.has(block_hash):
                return
            yield block_hash, block_id

    def _pays(self, num_blocks: int, *, busy: bool) -> bool:
        """True if loading these blocks is faster than computing them, or too little is known."""
        copied, computed = self._rate.bytes_per_s, self._rates.prefill_tokens_per_s
        if not copied or not computed:
            return True
        ahead = sum(len(load.hashes) for load in self._loads)
        load_s = (ahead + num_blocks) * self._memory.block_bytes / copied
        wait_s = max(load_s, self._rates.decode_step_s if busy else 0.0)
        return wait_s < num_blocks * self._block_size / computed

    def _start_load(
        self,
        matched: Sequence[int],
        run: Sequence[tuple[bytes, int | None]],
        missing: Sequence[bytes],
    ) -> None:
        # Holding comes first: what is allocated could be the very blocks that precede it.
        self._blocks.hold(matched)
        self._blocks.hold([block_id for _, block_id in run if block_id is not None])
        new = self._blocks.allocate(len(missing))
        host_ids = self._tier.begin_loading(missing)
        unused = iter(new)
        rest = [next(unused) if block_id is None else block_id for _, block_id in run]
        try:
            copy = self._memory.load(host_ids, new)
        except Exception as error:
            self._give_up(error)
            self._tier.end_loading(missing)
            self._blocks.release([*matched, *rest])
            return
        load = _Load(copy, self._clock(), missing, new, [*matched, *rest])
        self._loads.append(load)
        self._load_of.update(dict.fromkeys(missing, load))

    def _end_load(self, load: _Load) -> None:
        self._loads.remove(load)
        for block_hash, block_id in zip(load.hashes, load.block_ids, strict=True):
            if self._load_of.get(block_hash) is load:
                del self._load_of[block_hash]
            if not load.flushed and not self._broken:
                self._blocks.insert(block_id, block_hash)
        if not self._broken:
            self._loaded_blocks += len(load.hashes)
            self._hit_tokens += len(load.hashes) * self._block_size
        self._tier.end_loading(load.hashes)
        self._blocks.release(load.held)

    def _start_save(self) -> None:
        savings = self._tier.begin_savings(self._blocks.num_free, self._batch)
        if not savings:
            return
        sources = [saving.block_id for saving in savings]
        try:
            copy = self._memory.save(sources, [saving.host_id for saving in savings])
        except Exception as error:
            self._give_up(error)
            for saving in savings:
                self._tier.end_saving(saving, copied=False)
            return
        self._saves.append(_Save(savings, copy))

    def _has_ended(self, copy: BlockCopy, num_blocks: int) -> bool:
        try:
            duration_s = copy.poll()
        except Exception as error:
            self._give_up(error)
            return True
        if duration_s is None:
            return False
        self._rate.observe(num_blocks * self._memory.block_bytes, duration_s)
        return True

    def _give_up(self, error: Exception) -> None:
        """Do without the tier from now on: who knows what arrived."""
        if not self._broken:
            self._log.error("Copying KV blocks failed; going on without them.", exc_info=error)
        self._broken = True
        self._tier.flush()

    def _in_time(self, load: _Load) -> bool:
        return self._clock() - load.started_at < MAX_WAIT_S

    def _remember(self, request_id: str) -> None:
        self._fetched[request_id] = None
        excess = len(self._fetched) - _MAX_REMEMBERED
        for old in list(islice(self._fetched, max(0, excess))):
            del self._fetched[old]


def build_tiers(
    memory: HostMemory | None,
    num_blocks: int,
    *,
    block_size: int,
    step_tokens: int,
    rates: StepRates,
    clock: Clock,
) -> tuple[BlockAllocator, TierCopies | None]:
    """Join the bookkeeping of a pool and of the host memory below it, if there is any.

    Args:
        memory: of the executor.
        num_blocks: in the pool.
        block_size: tokens per block.
        step_tokens: most tokens of a step.
        rates: of the engine's steps.
        clock: in seconds.
    """
    if memory is None:
        return BlockAllocator(num_blocks), None
    batch = -(-step_tokens // block_size)
    tier = HostTier(memory.num_blocks, window=min(num_blocks // 2, SAVED_STEPS * batch))
    blocks = BlockAllocator(num_blocks, tier=tier)
    copies = TierCopies(
        blocks, tier, memory, block_size=block_size, batch=batch, rates=rates, clock=clock
    )
    return blocks, copies
