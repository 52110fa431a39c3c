"""What every worker would cost in every part of one request, from the terms of cost.py.

Made by choose.py once per choice. Invariant: a worker that does not fit the demand has prices too,
which nobody looks at.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from router.placement import cost
from router.placement.columns import Flags, Rows, WorkerColumns
from router.placement.cost import EXPECTED_OUTPUT_TOKENS, Column, Prompt
from router.placement.decision import MAX_CANDIDATES, CopyRate, Ranking
from router.placement.pairing import Side
from router.placement.prefix_walk import Held


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrust:
    """Who fails of late, and why; see fleet/breakers.py."""

    workers: Mapping[str, str] = field(default_factory=dict)
    """Used only if there is nobody else."""
    pairs: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Prefill and decode worker between which no KV is moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be placed, and under which conditions."""

    prompt: Prompt
    held: Mapping[str, Held] = field(default_factory=dict)
    """What each worker has of the prompt."""
    popularity: float = 0.0
    """Recent requests for the longest prefix of the prompt that any worker has."""
    avoid: Collection[str] = ()
    """Workers that failed this request."""
    allow_avoided: bool = False
    """Take one of them if there is no other."""
    distrust: Distrust = Distrust()
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


Terms = Mapping[str, Column]
"""Seconds by the name of the term, of all workers."""


class Prices:
    """Terms of every worker in every part, worked out once per choice; arrays are by row."""

    def __init__(self, columns: WorkerColumns, demand: Demand, outlook: Outlook) -> None:
        self.columns = columns
        self.outlook = outlook
        prompt = demand.prompt
        matched, lower = np.zeros((2, len(columns["placed"])))
        for key, held in demand.held.items():
            row = columns.row(key)
            if row is not None:
                matched[row], lower[row] = held
        self.usable = fits(columns, demand)
        # Rows without a worker have a block size of 0; what comes out for them is never looked at.
        block_size = np.maximum(columns["block_size"], 1)
        self._price_host_copies(lower, block_size)
        self.cached = cost.cached_tokens(prompt, matched - (lower - self._copied), block_size)
        self.uncached = prompt.num_tokens - self.cached
        self.host_tokens = np.minimum(self._copied * block_size, self.cached)
        self.kv_bytes = cost.transfer_bytes(self.uncached, block_size, columns["block_bytes"])
        self._price_prefill(demand.popularity)
        self._price_decode(prompt, block_size)

    def _price_host_copies(self, lower: Column, block_size: Column) -> None:
        """A worker copies what it has in host memory only where that is faster than computing it.

        Source: engine/kv/tier_copies.py.
        """
        if not lower.any():
            self._copied = self._host_copy_s = lower
            return
        columns = self.columns
        copy_s = cost.host_copy_s(lower, columns["block_bytes"], columns.host_rates)
        pays = copy_s < cost.prefill_s(lower * block_size, columns.prefill_rates)
        self._copied, self._host_copy_s = np.where(pays, lower, 0.0), np.where(pays, copy_s, 0.0)

    def _price_prefill(self, popularity: float) -> None:
        columns, outlook = self.columns, self.outlook
        rate = columns.prefill_rates
        backlog_s = cost.backlog_s(columns["idle_at"], outlook.now)
        prefill_s = cost.prefill_s(self.uncached, rate)
        self.prefill = {
            "backlog_s": backlog_s,
            "prefill_s": prefill_s,
            "host_copy_s": self._host_copy_s,
            "crowding_s": cost.crowding_s(prefill_s, backlog_s, outlook.arrivals_per_s, popularity),
        }

    def _price_decode(self, prompt: Prompt, block_size: Column) -> None:
        columns = self.columns
        tokens = min(prompt.max_new_tokens, self.outlook.output_tokens)
        batch, places = columns["batch"], np.maximum(columns["places"], 1)
        decode_s = cost.decode_s(tokens, columns.decode_steps_s, batch, places)
        growth = cost.growth_blocks(batch, self.outlook.output_tokens, block_size)
        # What comes back from host memory takes blocks like anything that is computed.
        on_device = self.cached - self.host_tokens
        needed = np.ceil((prompt.num_tokens + tokens - on_device) / block_size)
        self.decode = {
            "host_copy_s": self._host_copy_s,
            "decode_s": decode_s,
            "batch_wait_s": cost.batch_wait_s(decode_s, batch, places),
            "kv_wait_s": cost.kv_wait_s(decode_s, needed, columns["free_blocks"] - growth),
        }
        own_s = self.prefill["prefill_s"]
        self.local = self.prefill | {"stall_s": cost.stall_s(own_s, batch)} | self.decode
        # Where no prompt could go to a prefill worker, it stalls as many sequences as anywhere.
        # What matters is then that prompts do not meet: they would make one long gap together.
        gap_s = own_s + self.prefill["backlog_s"]
        self.alone = self.prefill | {"stall_s": cost.stall_s(gap_s, batch)} | self.decode

    def host_copy(self, row: int) -> CopyRate | None:
        """How fast a worker is expected to copy from host memory, if it has to."""
        if not self._copied[row]:
            return None
        measured = bool(self.columns["host_rate"][row])
        return CopyRate(float(self.columns.host_rates[row]), measured)

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
            host_tokens=self.host_tokens[best],
            terms={name: term[best] for name, term in terms.items()},
            considered=len(rows),
        )


def fits(columns: WorkerColumns, demand: Demand) -> Flags:
    """Workers that could serve the demand."""
    usable = columns.flags("ready") & (columns["max_model_len"] >= demand.prompt.total_tokens)
    if demand.model_digest is not None:
        usable &= columns.has_digest(demand.model_digest)
    return usable
