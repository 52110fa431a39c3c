"""The choice itself: a pure function from what is known of the workers to a Placement.

Up to three plans are priced, and the cheapest is taken: a pair of workers with the KV moved between
them; a decode worker that computes the prompt too, where what it lacks is short enough for that;
and, only if neither is possible, any worker alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.errors import UnavailableError
from router.placement import cost
from router.placement.columns import Flags, Rows, WorkerColumns
from router.placement.decision import (
    MAX_CANDIDATES,
    CopyRate,
    Mode,
    Placement,
    Refusal,
)
from router.placement.pairing import cheapest, cheapest_pair
from router.placement.prices import Demand, Distrust, Outlook, Prices, Terms, fits

MAX_REASONS = 16
"""Refusals that an error names."""


def choose(
    columns: WorkerColumns,
    demand: Demand,
    outlook: Outlook,
    *,
    absent: Sequence[Refusal] = (),
) -> Placement:
    """The cheapest way to serve the demand now.

    Args:
        columns: attached workers.
        demand: what is to be placed.
        outlook: what is expected.
        absent: workers that are known but not attached, with the reason.

    Raises:
        UnavailableError: every worker was refused; the message says why each was.
    """
    prices = Prices(columns, demand, outlook)
    refused = [*absent, *_refusals(columns, demand)]
    usable = prices.usable
    for rows in _by_trust(columns, usable, demand):
        if rows.any():
            refused += _left_out(columns, usable & ~rows, demand)
            return _choose_among(prices, rows, refused, demand.distrust)
    refused += _left_out(columns, usable, demand)
    reasons = "; ".join(str(refusal) for refusal in refused[:MAX_REASONS])
    raise UnavailableError(f"No worker can take the request: {reasons or 'none is configured'}.")


def _by_trust(columns: WorkerColumns, usable: Flags, demand: Demand) -> Iterator[Flags]:
    """The usable workers that may be chosen from, the best first: with some left out, then fewer.

    One that failed others is better than one that failed this request, and either than none.
    """
    if not demand.avoid and not demand.distrust.workers:
        yield usable
        return
    avoided = _marked(columns, demand.avoid)
    shut = _marked(columns, demand.distrust.workers)
    yield usable & ~avoided & ~shut
    yield usable & ~avoided
    if demand.allow_avoided:
        yield usable & ~shut
        yield usable


def _marked(columns: WorkerColumns, keys: Iterable[str]) -> Flags:
    marked = np.zeros_like(columns.flags("present"))
    rows = [row for key in keys if (row := columns.row(key)) is not None]
    marked[rows] = True
    return marked


def _left_out(columns: WorkerColumns, rows: Flags, demand: Demand) -> list[Refusal]:
    """Why workers that could serve the demand are not asked to."""
    refusals = []
    for row in np.flatnonzero(rows)[:MAX_CANDIDATES].tolist():
        key = columns.view(row).key
        failed = "failed this request"
        reason = failed if key in demand.avoid else demand.distrust.workers.get(key, failed)
        refusals.append(Refusal((key,), reason))
    return refusals


def least_backlog_s(columns: WorkerColumns, now: float) -> float:
    """Backlog of the least busy ready worker that prompts go to first; 0 if none is ready."""
    ready, prefills = columns.flags("ready"), columns.flags("prefills")
    pool = ready & prefills if (ready & prefills).any() else ready
    if not pool.any():
        return 0.0
    return float(cost.backlog_s(columns["idle_at"][pool], now).min())


def _refusals(columns: WorkerColumns, demand: Demand) -> list[Refusal]:
    unfit = np.flatnonzero(columns.flags("present") & ~fits(columns, demand))
    refusals = []
    for row in unfit[:MAX_CANDIDATES].tolist():
        view = columns.view(row)
        total, limit = demand.prompt.total_tokens, view.info.max_model_len
        if not columns.flags("ready")[row]:
            reason = f"is {view.load.state.value}"
        elif total > limit:
            reason = f"prompt and max_tokens make {total} tokens, its context holds {limit}"
        else:
            reason = "serves another model than the one that began the output"
        refusals.append(Refusal((view.key,), reason))
    return refusals


@dataclass(frozen=True, slots=True)
class _Plan:
    """A way to serve the request, and what it costs."""

    mode: Mode
    worker: int
    prefill: int | None
    cost_s: float
    why: str
    alone: tuple[Rows, Terms] | None = None
    """The workers that were compared and by what, where one serves alone."""


def _choose_among(
    prices: Prices, usable: Flags, refused: Sequence[Refusal], distrust: Distrust
) -> Placement:
    """The cheapest plan with the usable workers, of which there is one at least."""
    columns = prices.columns
    prefill = np.flatnonzero(usable & columns.flags("prefills"))
    decode = np.flatnonzero(usable & ~columns.flags("prefills"))
    dark = [
        (source, target)
        for pair in distrust.pairs
        if (source := columns.row(pair[0])) is not None
        and (target := columns.row(pair[1])) is not None
    ]
    refused = [
        *refused,
        *(Refusal(pair, why) for pair, why in distrust.pairs.items()),
        *_unpaired(columns, prefill, decode),
    ]

    plans = _pairs(prices, prefill, decode, dark)
    limit = prices.outlook.local_prefill_max_tokens
    near = decode[prices.uncached[decode] <= limit] if len(prefill) else decode[:0]
    if len(near):
        why = f"it lacks at most {limit} tokens, and no pair is cheaper"
        plans.append(_alone(prices, near, prices.local, Mode.LOCAL, why))
    if not plans:
        plans.append(_any_alone(prices, np.flatnonzero(usable), prefill, decode))
    best = min(plans, key=lambda plan: plan.cost_s)
    return _placement(prices, best, plans, (prefill, decode), refused)


def _pairs(
    prices: Prices, prefill: Rows, decode: Rows, dark: Sequence[tuple[int, int]]
) -> list[_Plan]:
    """The cheapest pair among the workers that can exchange KV, if there is any."""
    columns = prices.columns
    exporters = prefill[columns.flags("exports")[prefill]]
    kinds = columns["kind"]
    pairs = []
    for kind in kinds[exporters[:1]] if columns.alike else np.unique(kinds[exporters]):
        sources = exporters[kinds[exporters] == kind]
        targets = decode[kinds[decode] == kind]
        pair = cheapest_pair(
            columns,
            prices.side(sources, prices.prefill),
            prices.side(targets, prices.decode),
            prices.kv_bytes[targets],
            dark,
        )
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        return []
    best = min(pairs, key=lambda pair: pair.cost_s)
    why = "least predicted seconds of all matching pairs"
    return [_Plan(Mode.DISAGGREGATED, best.importer, best.exporter, best.cost_s, why)]


def _alone(prices: Prices, rows: Rows, terms: Terms, mode: Mode, why: str) -> _Plan:
    side = prices.side(rows, terms)
    worker = cheapest(side, prices.columns["placed"])
    return _Plan(mode, worker, None, float(side.cost_s.min()), why, (rows, terms))


def _any_alone(prices: Prices, everyone: Rows, prefill: Rows, decode: Rows) -> _Plan:
    plan = _alone(prices, everyone, prices.alone, Mode.DECODE_ONLY, "")
    if prices.columns.flags("prefills")[plan.worker]:
        missing, mode = ("decode" if not len(decode) else "matching decode"), Mode.PREFILL_ONLY
    else:
        missing, mode = ("prefill" if not len(prefill) else "matching prefill"), Mode.DECODE_ONLY
    return replace(plan, mode=mode, why=f"no {missing} worker can take it")


def _unpaired(columns: WorkerColumns, prefill: Rows, decode: Rows) -> list[Refusal]:
    """Why workers can't be part of a pair, as far as they can't."""
    silent = prefill[~columns.flags("exports")[prefill]]
    refusals = [Refusal((columns.view(row).key,), "exports no KV") for row in silent.tolist()]
    exporters = prefill[columns.flags("exports")[prefill]]
    if len(exporters) and len(decode) and not columns.alike:
        kinds = columns["kind"]
        lonely = [
            *exporters[~np.isin(kinds[exporters], kinds[decode])].tolist(),
            *decode[~np.isin(kinds[decode], kinds[exporters])].tolist(),
        ]
        reason = "no worker of the other pool has its model digest and KV layout"
        refusals += [Refusal((columns.view(row).key,), reason) for row in lonely]
    return refusals


def _placement(
    prices: Prices,
    best: _Plan,
    plans: Sequence[_Plan],
    pools: tuple[Rows, Rows],
    refused: Sequence[Refusal],
) -> Placement:
    columns = prices.columns
    prefill, decode = pools
    rate, rankings = None, []
    for plan in (best, *(plan for plan in plans if plan is not best)):
        if plan.alone is not None:
            rankings.append(prices.ranking("local", *plan.alone))
            continue
        assert plan.prefill is not None
        links = columns.link_rates(np.array([plan.prefill]), decode)
        transfer_s = np.zeros_like(prices.kv_bytes)
        transfer_s[decode] = cost.transfer_s(prices.kv_bytes[decode], links[0])
        rankings.append(prices.ranking("prefill", prefill, prices.prefill))
        terms = {"transfer_s": transfer_s} | prices.decode
        rankings.append(prices.ranking("decode", decode, terms))
        if plan is best:
            measured = columns.link_is_measured(plan.prefill, plan.worker)
            rate = CopyRate(float(links[0, decode == plan.worker][0]), measured)
    computes = best.worker if best.prefill is None else best.prefill
    return Placement(
        mode=best.mode,
        worker=columns.view(best.worker).key,
        prefill=None if best.prefill is None else columns.view(best.prefill).key,
        cached_tokens=int(prices.cached[computes]),
        why=best.why,
        rankings=rankings,
        refused=tuple(refused[:MAX_CANDIDATES]),
        cost_s=best.cost_s,
        alternatives={plan.mode.value: plan.cost_s for plan in plans if plan is not best},
        transfer=rate,
        host_copy=prices.host_copy(computes),
    )
