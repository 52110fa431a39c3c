"""The numbers of all workers in arrays, one row per worker, so that a choice looks at all at once.

Owned by the placer, which rewrites a worker's row whenever something is heard of it or sent to it.
A row is used again once its worker is gone. Invariant: a row without a worker is not `present`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.fleet.worker import KvLayout, Role, WorkerInfo, WorkerLoad, WorkerState
from router.placement.cost import ASSUMED_HOST_BYTES_PER_S, Column, CostSettings

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]

FIRST_ROWS = 16
_FLAGS = ("present", "ready", "prefills", "exports")
_NUMBERS = (
    *("digest", "kind", "max_model_len", "block_size", "block_bytes", "prefill_rate", "idle_at"),
    *("step_s", "batch", "places", "free_blocks", "placed", "host_rate", "fastest_link"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as placement sees it: its latest report plus what was sent since."""

    key: str
    info: WorkerInfo
    load: WorkerLoad
    idle_at: float = 0.0
    """When it will have computed all prompts that it has, monotonic seconds."""
    sent_requests: int = 0
    """Requests sent to it since the report that will occupy a place in its batch."""
    sent_blocks: int = 0
    """KV blocks that those will need."""
    placed: int = 0
    """Legs ever placed on it; evens out ties."""


class WorkerColumns:
    """See the module. Workers with equal `kind` can exchange KV."""

    def __init__(self, settings: CostSettings) -> None:
        self._settings = settings
        # Each apart: a choice looks at a few numbers of every row, never at all of one row.
        self._flags: dict[str, Flags] = {name: np.zeros(0, np.bool_) for name in _FLAGS}
        self._numbers: dict[str, Column] = {name: np.zeros(0) for name in _NUMBERS}
        self._views: list[WorkerView | None] = []
        self._rows: dict[str, int] = {}
        self.names: tuple[str, ...] = ()
        """Of the workers, by row; a new tuple whenever one is added."""
        self._kinds: dict[tuple[bytes, KvLayout], int] = {}
        self._digests: dict[bytes, int] = {}
        self._links = np.zeros((0, 0))
        """Bytes per second from row to column, measured or assumed."""

    def __getitem__(self, name: str) -> Column:
        """One number of every row."""
        return self._numbers[name]

    def flags(self, name: str) -> Flags:
        """One property of every row."""
        return self._flags[name]

    def row(self, key: str) -> int | None:
        """Where a worker's numbers are, if it is there."""
        return self._rows.get(key)

    def view(self, row: int) -> WorkerView:
        """The worker in a row."""
        view = self._views[row]
        assert view is not None
        return view

    def has_digest(self, digest: bytes) -> Flags:
        """Which workers serve the model with this digest."""
        found: Flags = self["digest"] == self._digests.get(digest, -1)
        return found

    @property
    def prefill_rates(self) -> Column:
        """Prompt tokens per second of every row, measured or typical."""
        return _known(self["prefill_rate"], self.typical_prefill_rate)

    @property
    def decode_steps_s(self) -> Column:
        """Seconds of a decode step of every row, measured or typical."""
        steps = self["step_s"]
        return _known(steps, _typical(steps, self._settings.decode_step_s))

    @property
    def host_rates(self) -> Column:
        """Bytes per second that every row copies from host memory, measured or typical."""
        rates = self["host_rate"]
        return _known(rates, _typical(rates, ASSUMED_HOST_BYTES_PER_S))

    @property
    def typical_prefill_rate(self) -> float:
        """Of a worker that has not computed a prompt yet: most likely that of those that have."""
        return _typical(self["prefill_rate"], self._settings.prefill_tokens_per_s)

    @property
    def alike(self) -> bool:
        """True if no two workers that were ever there differ in kind."""
        return len(self._kinds) <= 1

    def put(self, view: WorkerView) -> None:
        """Add a worker, or bring its numbers up to date."""
        row = self._rows.get(view.key)
        if row is None:
            row = self._rows[view.key] = self._free_row()
        before, self._views[row] = self._views[row], view
        info, load = view.info, view.load
        layout = info.layout
        prefills = info.role is Role.PREFILL
        # Its hand-overs will take places in a decode worker's batch, which are not in its queue.
        batch = load.running + load.waiting + (0 if prefills else load.leases)
        promised = load.awaited_blocks + view.sent_blocks
        free = info.num_blocks - load.held_blocks - promised
        self._set(
            row,
            present=True,
            ready=load.state is WorkerState.READY,
            prefills=prefills,
            exports=bool(info.kv_address),
            digest=self._digests.setdefault(info.model_digest, len(self._digests)),
            kind=self._kinds.setdefault((info.model_digest, layout), len(self._kinds)),
            max_model_len=info.max_model_len,
            block_size=layout.block_size,
            block_bytes=layout.block_bytes,
            prefill_rate=load.prefill_tokens_per_s,
            idle_at=view.idle_at,
            step_s=load.decode_step_s,
            batch=batch + view.sent_requests,
            places=max(1, info.max_num_seqs),
            free_blocks=free if info.num_blocks else np.inf,
            placed=view.placed,
            host_rate=load.host_bytes_per_s,
        )
        if before is None:
            self.names = tuple(view.key if view else "" for view in self._views)
            self._join_links(row)
        elif before.load.link_bytes_per_s != load.link_bytes_per_s:
            for other in self._rows.values():
                self._note_link(other, row)
            self._note_fastest(row)

    def drop(self, key: str) -> None:
        """Take a worker out."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        self._views[row] = None
        self._set(row, **dict.fromkeys((*_FLAGS, *_NUMBERS), 0))

    def link_rates(self, exporters: Rows, importers: Rows) -> Column:
        """Bytes per second from each exporter to each importer, [exporters, importers]."""
        rates: Column = self._links[exporters[:, None], importers]
        return rates

    def link_is_measured(self, exporter: int, importer: int) -> bool:
        """False if its rate is only assumed."""
        return self.view(exporter).info.worker_id in self.view(importer).load.link_bytes_per_s

    def _set(self, row: int, **values: float) -> None:
        for name, value in values.items():
            column = self._flags[name] if name in self._flags else self._numbers[name]
            column[row] = value

    def _free_row(self) -> int:
        absent = np.flatnonzero(~self.flags("present"))
        if len(absent):
            return int(absent[0])
        before, after = len(self._views), max(FIRST_ROWS, 2 * len(self._views))
        more = after - before
        self._flags = {name: np.pad(column, (0, more)) for name, column in self._flags.items()}
        self._numbers = {name: np.pad(column, (0, more)) for name, column in self._numbers.items()}
        self._views += [None] * more
        self._links = np.pad(self._links, (0, more))
        return before

    def _join_links(self, row: int) -> None:
        for other in self._rows.values():
            self._note_link(row, other)
            self._note_link(other, row)
            self._note_fastest(other)

    def _note_link(self, exporter: int, importer: int) -> None:
        """A link goes at its measured rate, or else at what its length lets one assume."""
        source, target = self.view(exporter), self.view(importer)
        rate = target.load.link_bytes_per_s.get(source.info.worker_id)
        if rate is None:
            rate = self._settings.assumed_rate(source.info.place.distance(target.info.place))
        self._links[exporter, importer] = rate

    def _note_fastest(self, importer: int) -> None:
        """No link of this worker is faster; the one that is may be that of one that has gone."""
        self["fastest_link"][importer] = self._links[:, importer].max()


def _typical(column: Column, default: float) -> float:
    """Median of what was measured; `default` if nothing was."""
    measured = np.sort(column[column > 0])  # several times as fast as np.median
    count = len(measured)
    return float(measured[(count - 1) // 2] + measured[count // 2]) / 2 if count else default


def _known(column: Column, typical: float) -> Column:
    known: Column = np.where(column > 0, column, typical)
    return known
