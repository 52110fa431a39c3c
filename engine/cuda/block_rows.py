"""Block tables as arrays, kept from step to step, because only their ends change."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.plan import Chunk

_SPARE = 16


class BlockRows:
    """One array per request. A table is the same list as before and longer, or another list."""

    def __init__(self, max_requests: int) -> None:
        """Remember at least the tables of `max_requests` requests."""
        self._max_requests = max_requests
        self._rows: dict[str, _Row] = {}

    def array(self, chunk: Chunk, count: int) -> npt.NDArray[np.int32]:
        """The first `count` ids of a chunk's table."""
        row = self._rows.get(chunk.request_id)
        if row is None or row.table is not chunk.block_table:
            row = self._rows[chunk.request_id] = _Row(chunk.block_table)
        return row.array(count)

    def forget_all_but(self, chunks: Sequence[Chunk]) -> None:
        """Drop tables of requests that are not in a step, once too many were kept."""
        if len(self._rows) > 2 * self._max_requests:
            self._rows = {
                chunk.request_id: self._rows[chunk.request_id]
                for chunk in chunks
                if chunk.request_id in self._rows
            }


class _Row:
    __slots__ = ("_ids", "_known", "table")

    def __init__(self, table: Sequence[int]) -> None:
        self.table = table
        self._ids = np.empty(len(table) + _SPARE, np.int32)
        self._known = 0

    def array(self, count: int) -> npt.NDArray[np.int32]:
        if count > self._known:
            if count > len(self._ids):
                self._ids = np.resize(self._ids, 2 * count)
            self._ids[self._known : count] = self.table[self._known : count]
            self._known = count
        return self._ids[:count]
