"""Which prefill worker for which decode worker: the one cost that depends on both is the transfer.

Used by choose.py on workers that it has priced. Invariant: no pair is cheaper than the one found;
of equally cheap ones it is the one whose workers were placed on least.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.placement.columns import Rows, WorkerColumns
from router.placement.cost import Column, transfer_s

TIE_S = 1e-9
"""Costs that differ by less are the same: sums of floats in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The workers of one side: rows and, as long, what each costs without the transfer."""

    rows: Rows
    cost_s: Column


@dataclass(frozen=True, slots=True)
class Pair:
    """Rows of a prefill and a decode worker, and what they cost with their transfer."""

    exporter: int
    importer: int
    cost_s: float


def cheapest(side: Side, placed: Column) -> int:
    """Row of the cheapest worker, of equals the one that was placed on least."""
    equal = np.flatnonzero(side.cost_s <= side.cost_s.min() + TIE_S)
    return int(side.rows[equal[np.argmin(placed[side.rows[equal]])]])


def cheapest_pair(
    columns: WorkerColumns,
    exporters: Side,
    importers: Side,
    kv_bytes: Column,
    dark: Sequence[tuple[int, int]] = (),
) -> Pair | None:
    """The best pair of workers that can exchange KV; None if there is none.

    Args:
        columns: links and how often each worker was placed on.
        exporters: prefill workers.
        importers: decode workers.
        kv_bytes: what each importer would have to read, [importers].
        dark: rows of pairs that are not taken at any cost.
    """
    if not len(exporters.rows) or not len(importers.rows):
        return None
    # Only exporters that could win with the best link of all need a look at each of their links.
    first = int(np.argmin(exporters.cost_s))
    rates = columns.link_rates(exporters.rows[first : first + 1], importers.rows)
    reachable = exporters.cost_s[first] + importers.cost_s + transfer_s(kv_bytes, rates[0])
    for source, target in dark:
        if source == exporters.rows[first]:
            reachable[importers.rows == target] = np.inf
    fastest = columns["fastest_link"][importers.rows]
    floor = (importers.cost_s + transfer_s(kv_bytes, fastest)).min()
    able = np.flatnonzero(exporters.cost_s + floor <= reachable.min() + TIE_S)

    rows = exporters.rows[able]
    rates = columns.link_rates(rows, importers.rows)
    cost_s = exporters.cost_s[able, None] + (importers.cost_s + transfer_s(kv_bytes, rates))
    for source, target in dark:
        cost_s[np.ix_(rows == source, importers.rows == target)] = np.inf
    best_s = float(cost_s.min())
    if best_s == np.inf:
        return None
    sources, targets = np.nonzero(cost_s <= best_s + TIE_S)
    placed = columns["placed"]
    turns = np.lexsort((placed[importers.rows[targets]], placed[rows[sources]]))[0]
    return Pair(int(rows[sources[turns]]), int(importers.rows[targets[turns]]), best_s)
