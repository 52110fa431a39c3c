"""Which worker has which KV block cached: block hash -> set of workers, as bits of an int.

Two kinds of entries. Known ones follow the workers' cache events exactly (epoch and sequence are
checked here; a gap means resynchronise). Predicted ones are made when the router sends a prompt to
a worker, so that the next request with the same prefix follows it at once; they last until the
worker confirms or denies them, or until they expire.

Called by placer.py. Pure: time comes in as an argument.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain

from router.fleet.worker import CacheChange


class Applied(Enum):
    """What became of a cache event."""

    APPLIED = auto()
    IGNORED = auto()
    """Older than what is known."""
    NEEDS_RESYNC = auto()
    """Events were lost: the worker's entries can't be kept right without a snapshot."""


@dataclass(slots=True)
class _Member:
    bit: int
    epoch: int
    synced: bool = False
    seq: int = 0
    known: set[bytes] = field(default_factory=set)
    """On the device."""
    host: set[bytes] = field(default_factory=set)
    """In the memory of its host: as good as known, at the price of a copy."""
    predicted: dict[bytes, float] = field(default_factory=dict)
    """Hash to the time when the prediction ends."""
    expiries: deque[tuple[float, Sequence[bytes]]] = field(default_factory=deque)


class PrefixIndex:
    """Longest-prefix lookup over every worker at once."""

    def __init__(self, *, prediction_ttl_s: float) -> None:
        self._ttl_s = prediction_ttl_s
        self._masks: dict[bytes, int] = {}
        self._members: dict[str, _Member] = {}
        self._names: dict[int, str] = {}

    def __len__(self) -> int:
        """Distinct blocks that some worker has or is about to have."""
        return len(self._masks)

    def add(self, worker: str, epoch: int) -> None:
        """Start to follow a worker, knowing nothing of it; it owes a snapshot."""
        self.drop(worker)
        bit = 1
        while bit in self._names:
            bit <<= 1
        self._names[bit] = worker
        self._members[worker] = _Member(bit=bit, epoch=epoch)

    def drop(self, worker: str) -> None:
        """Forget a worker and everything it had. Costs as much as it had."""
        member = self._members.pop(worker, None)
        if member is not None:
            self._forget(member)
            del self._names[member.bit]

    def apply(self, worker: str, change: CacheChange) -> Applied:
        """Apply one cache event of `worker`, in the order of arrival.

        A gap or another epoch empties what is known of the worker: an entry that may be stale would
        attract requests for nothing.
        """
        member = self._members.get(worker)
        if member is None:
            return Applied.IGNORED
        if change.reset:
            self._forget(member)
            member.epoch, member.seq, member.synced = change.epoch, change.seq, True
        elif member.synced and change.epoch == member.epoch and change.seq <= member.seq:
            return Applied.IGNORED
        elif not member.synced or change.epoch != member.epoch or change.seq != member.seq + 1:
            self._forget(member)
            member.synced = False
            return Applied.NEEDS_RESYNC
        member.seq = change.seq
        member.known.difference_update(change.removed)
        member.host.difference_update(change.host_removed)
        member.known.update(change.stored)
        member.host.update(change.host_stored)
        for block in chain(change.removed, change.host_removed):
            member.predicted.pop(block, None)
            if block not in member.known and block not in member.host:
                self._clear(block, member.bit)
        for block in chain(change.stored, change.host_stored):
            member.predicted.pop(block, None)
            self._masks[block] = self._masks.get(block, 0) | member.bit
        return Applied.APPLIED

    def predict(self, worker: str, hashes: Sequence[bytes], now: float) -> None:
        """Count the blocks of a prompt that was just sent to `worker` as cached there."""
        member = self._members.get(worker)
        if member is None:
            return
        until = now + self._ttl_s
        fresh = [
            block for block in hashes if block not in member.known and block not in member.host
        ]
        for block in fresh:
            member.predicted[block] = until
            self._masks[block] = self._masks.get(block, 0) | member.bit
        if fresh:
            member.expiries.append((until, fresh))

    def expire(self, now: float) -> None:
        """End the predictions whose time has come. Amortised constant time per prediction."""
        for member in self._members.values():
            while member.expiries and member.expiries[0][0] <= now:
                _, hashes = member.expiries.popleft()
                for block in hashes:
                    # A later prediction of the same block has moved its end.
                    if member.predicted.get(block, now + 1) <= now:
                        del member.predicted[block]
                        self._clear(block, member.bit)

    def match(self, hashes: Iterable[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` that each worker has; workers with none are left out.

        Costs one dictionary lookup per block until no worker has the next one, plus one step per
        worker that matched, however many workers there are.
        """
        matched: dict[str, int] = {}
        length = 0
        alive = -1
        for block in hashes:
            holders = alive & self._masks.get(block, 0)
            if alive > 0:
                self._note(matched, alive & ~holders, length)
            alive = holders
            if not alive:
                break
            length += 1
        if alive > 0:
            self._note(matched, alive, length)
        return matched

    def _note(self, matched: dict[str, int], mask: int, length: int) -> None:
        while mask:
            bit = mask & -mask
            matched[self._names[bit]] = length
            mask ^= bit

    def _forget(self, member: _Member) -> None:
        for block in chain(member.known, member.host, member.predicted):
            self._clear(block, member.bit)
        member.known.clear()
        member.host.clear()
        member.predicted.clear()
        member.expiries.clear()

    def _clear(self, block: bytes, bit: int) -> None:
        mask = self._masks.get(block, 0) & ~bit
        if mask:
            self._masks[block] = mask
        else:
            self._masks.pop(block, None)
