"""Rows of a TokenBatch: what one engine step made of each request, and their columns on the wire.

Written by workers, read by routers. A batch is parsed once per step and router, however many
requests run, and of most of them there is one token and nothing else to say; so the message has a
list for each thing that is said, and a note for the rare row of which there is more.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

from rpc.v1 import worker_pb2


class TokenRow(NamedTuple):
    """Consecutive tokens of one request."""

    request_id: str
    attempt: int
    first_index: int
    """Of the first token in the whole output, earlier attempts included."""
    token_ids: Sequence[int]
    """At least one."""
    logprobs: Sequence[worker_pb2.TokenLogprobs] = ()
    """One per token where they were asked for, else none."""
    cached_tokens: int | None = None
    """Prompt tokens that a cache spared; said once."""


Row = tuple[str, int, int, Sequence[int], Sequence[worker_pb2.TokenLogprobs], int | None]
"""A TokenRow without its names, which cost more than all that is in it."""


def token_batch(rows: Sequence[TokenRow]) -> worker_pb2.TokenBatch:
    """Put rows into columns."""
    counts = [len(row.token_ids) for row in rows]
    return worker_pb2.TokenBatch(
        request_ids=[row.request_id for row in rows],
        attempts=[row.attempt for row in rows],
        first_indexes=[row.first_index for row in rows],
        counts=counts if any(count != 1 for count in counts) else (),
        token_ids=[token_id for row in rows for token_id in row.token_ids],
        notes=[
            worker_pb2.TokenNote(row=i, logprobs=row.logprobs, cached_tokens=row.cached_tokens)
            for i, row in enumerate(rows)
            if row.logprobs or row.cached_tokens is not None
        ],
    )


def token_rows(batch: worker_pb2.TokenBatch) -> Iterable[Row]:
    """The rows of a batch, in order.

    Raises:
        ValueError: the columns do not fit each other.
    """
    # A slice copies a repeated field far faster than a loop.
    request_ids, token_ids, counts = batch.request_ids[:], batch.token_ids[:], batch.counts[:]
    attempts, first_indexes = batch.attempts[:], batch.first_indexes[:]
    lengths = {len(request_ids), len(attempts), len(first_indexes), len(counts or token_ids)}
    if len(lengths) != 1:
        raise ValueError(f"columns of {sorted(lengths)} entries came for {len(request_ids)} rows")
    if counts and (sum(counts) != len(token_ids) or not all(counts)):
        raise ValueError(f"{len(token_ids)} tokens came, and counts of {sum(counts)}")
    ids = list(_cut(token_ids, counts)) if counts else [[token_id] for token_id in token_ids]
    rows = zip(request_ids, attempts, first_indexes, ids, repeat(()), repeat(None), strict=False)
    return _noted(list(rows), batch.notes) if batch.notes else rows


def _cut(token_ids: Sequence[int], counts: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    for count in counts:
        yield token_ids[start : start + count]
        start += count


def _noted(rows: list[Row], notes: Iterable[worker_pb2.TokenNote]) -> list[Row]:
    for note in notes:
        if note.row >= len(rows):
            raise ValueError(f"a note on row {note.row} came with {len(rows)} rows")
        request_id, attempt, first_index, ids, *_ = rows[note.row]
        if note.logprobs and len(note.logprobs) != len(ids):
            raise ValueError(f"{len(note.logprobs)} logprobs came with {len(ids)} tokens")
        cached_tokens = note.cached_tokens if note.HasField("cached_tokens") else None
        rows[note.row] = TokenRow(
            request_id, attempt, first_index, ids, note.logprobs, cached_tokens
        )
    return rows
