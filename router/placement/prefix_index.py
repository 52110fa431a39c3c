"""Which worker has which KV block cached.

Two kinds of entries. Known ones follow the workers' cache events exactly (epoch and sequence are
checked here; a gap means resynchronise). Predicted ones are made when the router sends a prompt to
a worker, so that the next request with the same prefix follows it at once; they last until the
worker confirms or denies them, or until they expire.

Blocks are found by 64 of the 128 bits of their hash. Two of ten million blocks that agree in those
have a chance of one in 400,000 to exist; all that comes of it is a wrong guess of what is cached.

Called by placer.py. Pure: time comes in as an argument.
"""

import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.block_hash import HASH_BYTES
from router.fleet.worker import CacheChange
from router.placement.block_table import BlockTable, Keys
from router.placement.holders import HolderSets, Ids
from router.placement.prefix_walk import ROW_BITS, Held, PrefixWalk

TIERS = 6
"""Places where a worker may keep blocks: device, host, disk and so on; one bit each."""
_ALL = (1 << ROW_BITS) - 1
_KNOWN = (1 << TIERS) - 1
_PREDICTED = _ALL & ~_KNOWN
"""Two bits that take turns every half of a prediction's life."""
FIRST_LOOK = 256
"""Landmarks looked up at first; four times as many each time, as long as somebody has them all."""
NEAR_BLOCKS = 256
"""Blocks at the begin of a prompt that are all landmarks."""
STRIDE = 16
"""Blocks from one landmark to the next beyond those."""


class Marks(NamedTuple):
    """Some blocks of a prompt, in order: as a rule its landmarks.

    Landmarks are looked at first: all blocks near the begin, few beyond. A worker gives up blocks
    before those that they follow, so one that has a block has, with rare exceptions, all before it.
    """

    keys: Keys
    ends: NDArray[np.int64]
    """Blocks of the prompt up to and with each."""

    @property
    def last(self) -> int:
        """Where the last of them ends; 0 if there is none."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def sparse(self) -> bool:
        """True if there may be blocks between them, or after."""
        return len(self.ends) >= NEAR_BLOCKS

    def next_after(self, begin: int, num_blocks: int) -> int:
        """Where the next one begins, or else the prompt of `num_blocks` ends."""
        ahead = int(np.searchsorted(self.ends, begin, side="right"))
        return int(self.ends[ahead]) - 1 if ahead < len(self.ends) else num_blocks


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
        return of_row << self.row * ROW_BITS


class PrefixIndex:
    """Longest-prefix lookup over every worker at once."""

    def __init__(self, *, prediction_ttl_s: float) -> None:
        self._turn_s = prediction_ttl_s / 2
        self._turn = 0
        self._table = BlockTable()
        self._sets = HolderSets()
        self._secret = np.uint64(secrets.randbits(64) | 1)
        """Without it nobody can make up prompts whose blocks crowd one place in the table."""
        self._members: dict[str, _Member] = {}
        self._rows: list[str | None] = []
        self._seen: tuple[Sequence[bytes], int, Marks] | None = None
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
            for hashes, out, into in ((removed, bit | predicted, 0), (stored, predicted, bit)):
                keys = self._keys(dict.fromkeys(hashes))
                self._edit(keys, partial(_swapped, out=out, into=into))
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
            marks = self._marks(hashes)
            rest = self._keys(hashes[marks.last :])
            self._edit(np.concatenate([marks.keys, rest]), edit, hurried=True)

    def expire(self, now: float) -> None:
        """End the predictions whose time has come."""
        turn = int(now // self._turn_s)
        if turn <= self._turn:
            return
        stale = _PREDICTED if turn > self._turn + 1 else 1 << TIERS + turn % 2
        self._turn = turn
        if self._rows:
            self._sets.strip(int.from_bytes(bytes([stale]) * len(self._rows), "little"))

    def match(self, hashes: Sequence[bytes]) -> dict[str, Held]:
        """What each worker has of the beginning of `hashes`; workers with none are left out.

        Costs one look into the table per landmark until no worker has the next one, however many
        workers there are, and one per block between where one of them stops and the next landmark.
        """
        marks, walk = self._marks(hashes), PrefixWalk(len(self._rows))
        begin, start, look = 0, 0, FIRST_LOOK
        while start < len(marks.ends) and walk.going:
            part = slice(start, start + look)
            begin = self._follow(walk, begin, self._table.get(marks.keys[part]), marks.ends[part])
            start += look
            look *= 4
        walk.stop(begin)
        if marks.sparse:
            self._look_closely(walk, hashes, marks)
        return {name: held for row, held in walk.result() if (name := self._rows[row]) is not None}

    def _look_closely(self, walk: PrefixWalk, hashes: Sequence[bytes], marks: Marks) -> None:
        """Let each row go on from the landmark where it stopped, block by block, to the next."""
        spans = [
            (begin, limit)
            for begin in walk.stops
            if begin < (limit := marks.next_after(begin, len(hashes)))
        ]
        ids = self._table.get(self._keys([h for span in spans for h in hashes[slice(*span)]]))
        start = 0
        for begin, limit in spans:
            own = ids[start : start + limit - begin]
            start += limit - begin
            walk.resume(begin)
            walk.stop(self._follow(walk, begin, own, np.arange(begin + 1, limit + 1)))

    def _follow(self, walk: PrefixWalk, begin: int, ids: Ids, ends: NDArray[np.int64]) -> int:
        """Let a walk go on from `begin`, given the holders of the last block before each end.

        Returns:
            Where those stand that still go.
        """
        changes = np.flatnonzero(ids[1:] != ids[:-1])
        runs = zip(
            ids[[0, *(changes + 1)]].tolist(),
            ends[[*changes, -1]].tolist(),
            strict=True,
        )
        for set_id, end in runs:
            walk.over(self._sets.mask(set_id), begin, end)
            if not walk.going:
                break
            begin = end
        return begin

    def _edit(self, keys: Keys, edit: Callable[[int], int], *, hurried: bool = False) -> None:
        """Change the holders of blocks, no two of them alike."""
        most = self._table.most_changed
        for start in range(0, len(keys), most):
            part = keys[start : start + most]
            self._table.change(part, lambda ids: self._sets.change(ids, edit))
            gone = self._table.tidy(self._sets.live, self._sets.alive, len(part), hurried=hurried)
            if len(gone):
                self._sets.release(gone)

    def _marks(self, hashes: Sequence[bytes]) -> Marks:
        """The landmarks of a prompt, worked out once if it is asked for again."""
        if self._seen is not None and self._seen[0] is hashes and self._seen[1] == len(hashes):
            return self._seen[2]
        near, far = hashes[:NEAR_BLOCKS], hashes[NEAR_BLOCKS + STRIDE - 1 :: STRIDE]
        ends = np.arange(1, len(near) + len(far) + 1)
        ends[len(near) :] += (STRIDE - 1) * np.arange(1, len(far) + 1)
        marks = Marks(self._keys([*near, *far]), ends)
        self._seen = hashes, len(hashes), marks
        return marks

    def _keys(self, hashes: Iterable[bytes]) -> Keys:
        """64 bits of each hash, spread by the secret; never 0, which marks a free slot.

        Source: multiply-shift hashing, Dietzfelbinger et al., A Reliable Randomized Algorithm for
        the Closest-Pair Problem (1997), section 2.
        """
        words = np.frombuffer(b"".join(hashes), np.uint64)
        keys: Keys = words[:: HASH_BYTES // words.itemsize] * self._secret
        keys[keys == 0] = 1
        return keys


def _swapped(mask: int, *, out: int, into: int) -> int:
    return (mask & ~out) | into


def _by_tier(change: CacheChange) -> Sequence[tuple[Sequence[bytes], Sequence[bytes]]]:
    """What a worker has stored and removed in each tier, the device first."""
    return [(change.stored, change.removed), (change.host_stored, change.host_removed)]
