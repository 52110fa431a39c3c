"""The choice itself: a pure function from what is known of the workers to a Placement.

Up to three plans are priced, and the cheapest is taken: a pair of workers with the KV moved between
them; a decode worker that computes the prompt too, where what it lacks is short enough for that;
and, only if neither is possible, any worker alone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from core.errors import UnavailableError
from router.placement import cost
from router.placement.columns import Flags, Rows, WorkerColumns
from router.placement.cost import EXPECTED_OUTPUT_TOKENS, Column, Prompt
from router.placement.decision import (
    MAX_CANDIDATES,
    Mode,
    Placement,
    Ranking,
    Refusal,
    TransferRate,
)
from router.placement.pairing import Side, cheapest, cheapest_pair

MAX_REASONS = 16
"""Refusals that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be placed, and under which conditions."""

    prompt: Prompt
    matched_blocks: Mapping[str, int] = field(default_factory=dict)
    """Leading blocks of the prompt in each worker's cache."""
    avoid: Collection[str] = ()
    """Workers that failed this request."""
    allow_avoided: bool = False
    """Take one of them if there is no other."""
    model_digest: bytes | None = None
    """Only workers with this digest: another model would not continue the output alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is expected of the fleet as a whole."""

    now: float = 0.0
    """Monotonic seconds, the clock of the workers' `idle_at`."""
    output_tokens: float = EXPECTED_OUTPUT_TOKENS
    """Length of an output, where the request allows it."""
    arrivals_per_s: float = 0.0
    """Prompts that one worker is sent to compute per second."""
    local_prefill_max_tokens: int = 0
    """Uncached tokens up to which decode may compute the prompt itself."""


def choose(
    columns: WorkerColumns,
    demand: Demand,
    outlook: Outlook = Outlook(),
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
    prices = _Prices(columns, demand, outlook)
    refused = [*absent, *_refusals(columns, demand)]
    usable = prices.usable
    avoided = np.zeros_like(usable)
    for key in demand.avoid:
        row = columns.row(key)
        if row is not None:
            avoided[row] = True
    placement = _choose_among(prices, usable & ~avoided, refused)
    if placement is None and demand.allow_avoided and (usable & avoided).any():
        placement = _choose_among(prices, usable, refused)
    if placement is not None:
        return placement
    refused += [
        Refusal((columns.view(row).key,), "failed this request")
        for row in np.flatnonzero(usable & avoided).tolist()
    ]
    reasons = "; ".join(str(refusal) for refusal in refused[:MAX_REASONS])
    raise UnavailableError(f"No worker can take the request: {reasons or 'none is configured'}.")


def least_backlog_s(columns: WorkerColumns, now: float) -> float:
    """Backlog of the least busy ready worker that prompts go to first; 0 if none is ready."""
    ready, prefills = columns.flags("ready"), columns.flags("prefills")
    pool = ready & prefills if (ready & prefills).any() else ready
    if not pool.any():
        return 0.0
    return float(cost.backlog_s(columns["idle_at"][pool], now).min())


class _Prices:
    """Terms of every worker in every part, worked out once per choice."""

    def __init__(self, columns: WorkerColumns, demand: Demand, outlook: Outlook) -> None:
        self.columns = columns
        self.outlook = outlook
        prompt = demand.prompt
        matched = np.zeros_like(columns["placed"])
        for key, blocks in demand.matched_blocks.items():
            row = columns.row(key)
            if row is not None:
                matched[row] = blocks
        self.usable = _fits(columns, demand)
        # Rows without a worker have a block size of 0; what comes out for them is never looked at.
        block_size = np.maximum(columns["block_size"], 1)
        self.cached = cost.cached_tokens(prompt, matched, block_size)
        self.uncached = prompt.num_tokens - self.cached
        self.kv_bytes = cost.transfer_bytes(self.uncached, block_size, columns["block_bytes"])
        self._price_prefill()
        self._price_decode(prompt, block_size)

    def _price_prefill(self) -> None:
        columns, outlook = self.columns, self.outlook
        rate = np.maximum(columns["prefill_rate"], 1e-9)
        backlog_s = cost.backlog_s(columns["idle_at"], outlook.now)
        prefill_s = cost.prefill_s(self.uncached, rate)
        self.prefill = {
            "backlog_s": backlog_s,
            "prefill_s": prefill_s,
            "crowding_s": cost.crowding_s(prefill_s, backlog_s, outlook.arrivals_per_s),
        }

    def _price_decode(self, prompt: Prompt, block_size: Column) -> None:
        columns = self.columns
        tokens = min(prompt.max_new_tokens, self.outlook.output_tokens)
        batch, places = columns["batch"], np.maximum(columns["places"], 1)
        decode_s = cost.decode_s(tokens, columns["step_s"], batch, places)
        growth = cost.growth_blocks(batch, self.outlook.output_tokens, block_size)
        needed = np.ceil((prompt.num_tokens + tokens - self.cached) / block_size)
        self.decode = {
            "decode_s": decode_s,
            "batch_wait_s": cost.batch_wait_s(decode_s, batch, places),
            "kv_wait_s": cost.kv_wait_s(decode_s, needed, columns["free_blocks"] - growth),
        }
        stall_s = cost.stall_s(self.prefill["prefill_s"], batch)
        self.alone = self.prefill | {"stall_s": stall_s} | self.decode

    def side(self, rows: Rows, terms: Mapping[str, Column]) -> Side:
        """The workers in some rows with the sum of some terms."""
        return Side(rows=rows, cost_s=np.add.reduce([term[rows] for term in terms.values()]))

    def ranking(self, part: str, rows: Rows, terms: Mapping[str, Column]) -> Ranking:
        """The best of the workers in some rows; `terms` are those of all rows."""
        order = np.lexsort((self.columns["placed"][rows], self.side(rows, terms).cost_s))
        best = rows[order[:MAX_CANDIDATES]]
        return Ranking(
            part=part,
            names=self.columns.names,
            rows=best,
            cached_tokens=self.cached[best],
            terms={name: term[best] for name, term in terms.items()},
            considered=len(rows),
        )


def _fits(columns: WorkerColumns, demand: Demand) -> Flags:
    usable = columns.flags("ready") & (columns["max_model_len"] >= demand.prompt.total_tokens)
    if demand.model_digest is not None:
        usable &= columns.has_digest(demand.model_digest)
    return usable


def _refusals(columns: WorkerColumns, demand: Demand) -> list[Refusal]:
    unfit = np.flatnonzero(columns.flags("present") & ~_fits(columns, demand))
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
    alone: Rows | None = None
    """The workers that were compared, where one serves alone."""


def _choose_among(prices: _Prices, usable: Flags, refused: Sequence[Refusal]) -> Placement | None:
    columns = prices.columns
    prefill = np.flatnonzero(usable & columns.flags("prefills"))
    decode = np.flatnonzero(usable & ~columns.flags("prefills"))
    refused = [*refused, *_unpaired(columns, prefill, decode)]

    plans = _pairs(prices, prefill, decode)
    limit = prices.outlook.local_prefill_max_tokens
    near = decode[prices.uncached[decode] <= limit] if len(prefill) else decode[:0]
    if len(near):
        why = f"it lacks at most {limit} tokens, and no pair is cheaper"
        plans.append(_alone(prices, near, Mode.LOCAL, why))
    if not plans:
        everyone = np.flatnonzero(usable)
        if not len(everyone):
            return None
        plans.append(_any_alone(prices, everyone, prefill, decode))
    best = min(plans, key=lambda plan: plan.cost_s)
    return _placement(prices, best, plans, (prefill, decode), refused)


def _pairs(prices: _Prices, prefill: Rows, decode: Rows) -> list[_Plan]:
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
        )
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        return []
    best = min(pairs, key=lambda pair: pair.cost_s)
    why = "least predicted seconds of all matching pairs"
    return [_Plan(Mode.DISAGGREGATED, best.importer, best.exporter, best.cost_s, why)]


def _alone(prices: _Prices, rows: Rows, mode: Mode, why: str) -> _Plan:
    side = prices.side(rows, prices.alone)
    worker = cheapest(side, prices.columns["placed"])
    return _Plan(mode, worker, None, float(side.cost_s.min()), why, rows)


def _any_alone(prices: _Prices, everyone: Rows, prefill: Rows, decode: Rows) -> _Plan:
    plan = _alone(prices, everyone, Mode.DECODE_ONLY, "")
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
    prices: _Prices,
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
            rankings.append(prices.ranking("local", plan.alone, prices.alone))
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
            rate = TransferRate(float(links[0, decode == plan.worker][0]), measured)
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
    )
