"""Which prefill worker for which decode worker: the one cost that depends on both is the transfer.

Used by `choose.py` on workers that it has scored. Invariant: no pair is cheaper than the one found,
and among equal workers it is of those that were placed on least.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.placement.cost import WorkerView
from router.placement.decision import Candidate, TransferRate


@dataclass(frozen=True, slots=True)
class Scored:
    """A worker in one part with its cost."""

    view: WorkerView
    candidate: Candidate
    kv_bytes: int = 0
    """Decode, while the transfer is not in its cost: what it would have to read."""

    @property
    def order(self) -> tuple[float, int, str]:
        """Cheapest first, then whoever was placed on least."""
        return (self.candidate.cost_s, self.view.placed, self.view.key)

    def reading_at(self, rate: TransferRate) -> "Scored":
        """This decode worker with the transfer in its cost."""
        terms = {"transfer_s": self.kv_bytes / rate.bytes_per_s} | dict(self.candidate.terms)
        return replace(self, candidate=replace(self.candidate, terms=terms), kv_bytes=0)


@dataclass(frozen=True, slots=True)
class Pair:
    """Prefill worker, decode worker, and what their transfer is expected to do."""

    exporter: Scored
    importer: Scored
    """Without the transfer in its cost."""
    rate: TransferRate
    cost_s: float


def link_rate(exporter: Scored, importer: Scored, assumed: float) -> TransferRate:
    """How fast the decode worker reads from the prefill worker, in bytes per second."""
    measured = importer.view.load.link_bytes_per_s.get(exporter.view.info.worker_id)
    return TransferRate(assumed, False) if measured is None else TransferRate(measured, True)


def cheapest_pair(
    exporters: Sequence[Scored], importers: Sequence[Scored], assumed: float
) -> Pair | None:
    """The best pair of workers that can exchange KV; None if one side is empty.

    Both sides are looked at cheapest first, and nobody who could not win with the decode worker's
    fastest link is priced, so that the pairs priced are few.

    Args:
        exporters: prefill workers.
        importers: decode workers, without the transfer in their cost.
        assumed: bytes per second of a link that was not measured.
    """
    best: Pair | None = None
    exporters = sorted(exporters, key=lambda each: each.order)
    for importer in sorted(importers, key=lambda each: each.order):
        fastest = max(assumed, max(importer.view.load.link_bytes_per_s.values(), default=0.0))
        base_s = importer.candidate.cost_s
        for exporter in exporters:
            cost_s = exporter.candidate.cost_s
            if best is not None and cost_s + (base_s + importer.kv_bytes / fastest) >= best.cost_s:
                break
            rate = link_rate(exporter, importer, assumed)
            cost_s += base_s + importer.kv_bytes / rate.bytes_per_s
            if best is None or cost_s < best.cost_s:
                best = Pair(exporter, importer, rate, cost_s)
    return best
