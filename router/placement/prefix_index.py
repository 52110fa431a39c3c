"""Which worker has which KV block cached.

Two kinds of entries. Known ones follow the workers' cache events exactly (epoch and sequence are
checked here; a gap means resynchronise). Predicted ones are made when the router sends a prompt to
a worker, so that the next request with the same prefix follows it at once; they last until the
worker confirms or denies them, or until they expire.

Blocks are found by 64 of the 128 bits of their hash. Two of ten million blocks that agree in those
have a chance of one in 400,000 to exist; all that comes of it is a wrong guess of what is cached.

Called by placer.py. Pure: time comes in as an argument.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

import numpy as np

from core.block_hash import HASH_BYTES
from router.fleet.worker import CacheChange
from router.placement.block_table import MOST_CHANGED, BlockTable, Keys
from router.placement.holders import HolderSets

TIERS = 6
"""Places where a worker may keep blocks: device, host, disk and so on; one bit each."""
_ROW_BITS = 8
_ALL = (1 << _ROW_BITS) - 1
_KNOWN = (1 << TIERS) - 1
_PREDICTED = _ALL & ~_KNOWN
"""Two bits that take turns every half of a prediction's life."""
FIRST_LOOK = 512
"""Blocks looked up at first; four times as many each time, as long as somebody has them all."""


class Applied(Enum):
    """What became of a cache event."""

    APPLIED = auto()
    IGNORED = auto()
    """Older than what is known."""
    NEEDS_RESYNC = auto()
    """Events were lost: the worker's entries can't be kept right without a snapshot."""


@dataclass(slots=True)
class _Member:
    row: int
    epoch: int
    synced: bool = False
    seq: int = 0

    def bits(self, of_row: int) -> int:
        return of_row << self.row * _ROW_BITS


class PrefixIndex:
    """Longest-prefix lookup over every worker at once."""

    def __init__(self, *, prediction_ttl_s: float) -> None:
        self._turn_s = prediction_ttl_s / 2
        self._turn = 0
        self._table = BlockTable()
        self._sets = HolderSets()
        self._members: dict[str, _Member] = {}
        self._rows: list[str | None] = []
        self._seen: tuple[Sequence[bytes], Keys] = ((), np.empty(0, np.uint64))
        """The prompt looked at last: what is matched is predicted next, on two workers."""

    def __len__(self) -> int:
        """Distinct blocks that some worker has or is about to have."""
        return self._sets.live

    @property
    def num_bytes(self) -> int:
        """Memory of the table of blocks."""
        return self._table.num_bytes

    def add(self, worker: str, epoch: int) -> None:
        """Start to follow a worker, knowing nothing of it; it owes a snapshot."""
        self.drop(worker)
        if None not in self._rows:
            self._rows.append(None)
        row = self._rows.index(None)
        self._rows[row] = worker
        self._members[worker] = _Member(row=row, epoch=epoch)

    def drop(self, worker: str) -> None:
        """Forget a worker and everything it had."""
        member = self._members.pop(worker, None)
        if member is not None:
            self._sets.strip(member.bits(_ALL))
            self._rows[member.row] = None

    def apply(self, worker: str, change: CacheChange) -> Applied:
        """Apply one cache event of `worker`, in the order of arrival.

        A gap or another epoch empties what is known of the worker: an entry that may be stale would
        attract requests for nothing.
        """
        member = self._members.get(worker)
        if member is None:
            return Applied.IGNORED
        if change.reset:
            self._sets.strip(member.bits(_ALL))
            member.epoch, member.seq, member.synced = change.epoch, change.seq, True
        elif member.synced and change.epoch == member.epoch and change.seq <= member.seq:
            return Applied.IGNORED
        elif not member.synced or change.epoch != member.epoch or change.seq != member.seq + 1:
            self._sets.strip(member.bits(_ALL))
            member.synced = False
            return Applied.NEEDS_RESYNC
        member.seq = change.seq
        predicted = member.bits(_PREDICTED)
        for tier, (stored, removed) in enumerate(_by_tier(change)):
            bit = member.bits(1 << tier)
            self._edit(_distinct(removed), partial(_swapped, out=bit | predicted, into=0))
            self._edit(_distinct(stored), partial(_swapped, out=predicted, into=bit))
        return Applied.APPLIED

    def predict(self, workers: Collection[str], hashes: Sequence[bytes], now: float) -> None:
        """Count the blocks of a prompt that was just sent to `workers` as cached there.

        They count for at least half of the time that predictions live, and at most for all of it.
        """
        self.expire(now)
        latest = 1 << TIERS + self._turn % 2
        members = [self._members[worker] for worker in workers if worker in self._members]
        places = [
            (member.bits(_KNOWN), ~member.bits(_PREDICTED), member.bits(latest))
            for member in members
        ]

        def edit(mask: int) -> int:
            for known, keep, add in places:
                if not mask & known:
                    mask = (mask & keep) | add
            return mask

        if places:
            self._edit(hashes, edit)

    def expire(self, now: float) -> None:
        """End the predictions whose time has come."""
        turn = int(now // self._turn_s)
        if turn <= self._turn:
            return
        stale = _PREDICTED if turn > self._turn + 1 else 1 << TIERS + turn % 2
        self._turn = turn
        if self._rows:
            self._sets.strip(int.from_bytes(bytes([stale]) * len(self._rows), "little"))

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` that each worker has; workers with none are left out.

        Costs one look into the table per block until no worker has the next one, plus one step per
        worker that matched, however many workers there are. Every block is looked at: a worker may
        have dropped one from the middle of a prompt, and what follows it there is of no use.
        """
        num_rows = len(self._rows)
        keys = self._keys(hashes)
        lengths = np.zeros(num_rows, np.int64)
        alive = np.ones(num_rows, np.bool_)
        start, look = 0, FIRST_LOOK
        while start < len(keys) and alive.any():
            ids = self._table.get(keys[start : start + look])
            begins = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()]
            for begin in begins:
                mask = self._sets.mask(int(ids[begin]))
                row_bytes = mask.to_bytes(num_rows, "little")
                holders = np.frombuffer(row_bytes, np.uint8) != 0
                lengths[alive & ~holders] = start + begin
                alive &= holders
                if not alive.any():
                    break
            start += len(ids)
            look *= 4
        lengths[alive] = len(keys)
        matched = {}
        for row in np.flatnonzero(lengths).tolist():
            name = self._rows[row]
            if name is not None:
                matched[name] = int(lengths[row])
        return matched

    def _edit(self, hashes: Sequence[bytes], edit: Callable[[int], int]) -> None:
        """Change the holders of blocks, no two of them alike."""
        keys = self._keys(hashes)
        for start in range(0, len(keys), MOST_CHANGED):
            slots = self._table.slots(keys[start : start + MOST_CHANGED])
            self._table.write(slots, self._sets.change(self._table.read(slots), edit))
            gone = self._table.tidy(self._sets.live, self._sets.alive, len(slots))
            if len(gone):
                self._sets.release(gone)

    def _keys(self, hashes: Sequence[bytes]) -> Keys:
        """The first 64 bits of each hash; never 0, which marks a free slot."""
        seen, keys = self._seen
        if seen is not hashes or len(keys) != len(hashes):
            words = np.frombuffer(b"".join(hashes), np.uint64)
            keys = words[:: HASH_BYTES // words.itemsize].copy()
            keys[keys == 0] = 1
            self._seen = hashes, keys
        return keys


def _distinct(hashes: Sequence[bytes]) -> Sequence[bytes]:
    return list(dict.fromkeys(hashes))


def _swapped(mask: int, *, out: int, into: int) -> int:
    return (mask & ~out) | into


def _by_tier(change: CacheChange) -> Sequence[tuple[Sequence[bytes], Sequence[bytes]]]:
    """What a worker has stored and removed in each tier, the device first."""
    return [(change.stored, change.removed), (change.host_stored, change.host_removed)]
