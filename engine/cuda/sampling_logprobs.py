"""Log probabilities of sampled tokens: computed on the device, read on the host a step later."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.tokens import TokenLogprobs
from engine.cuda.sampling_copies import to_host

_ROWS_AT_ONCE = 32
"""So that their float32 log probabilities take 20 MB at 152k tokens, however many rows ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLogprobs:
    """Log probabilities on their way to the host."""

    packed: torch.Tensor
    rows: Sequence[int]
    counts: Sequence[int]

    def results(self) -> dict[int, TokenLogprobs]:
        """By row of the step's specs. Call once the event after `to_host` has happened."""
        packed = self.packed.numpy()
        width = packed.shape[1] // 2
        ids = packed[:, :width].tolist()
        values = packed[:, width:].view("float32").tolist()
        return {
            row: TokenLogprobs(
                scores[0], tuple(zip(best[1 : n + 1], scores[1 : n + 1], strict=True))
            )
            for row, n, best, scores in zip(self.rows, self.counts, ids, values, strict=True)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLogprobs:
    """Of the rows that ask: the sampled token's, then the most likely tokens'."""

    packed: torch.Tensor
    """[L, 2 * (1 + most)] int32: ids, then the bits of float32 log probabilities."""
    rows: Sequence[int]
    """Which rows of the step's specs, [L]."""
    counts: Sequence[int]
    """How many most likely tokens each wants, [L]."""

    def to_host(self) -> HostLogprobs:
        """Start the copy on the current stream; the host does not wait."""
        return HostLogprobs(packed=to_host(self.packed), rows=self.rows, counts=self.counts)


def logprobs_of(
    logits: torch.Tensor,
    drawn: torch.Tensor,
    index: torch.Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
) -> DeviceLogprobs:
    """Log probabilities from unmodified logits.

    Args:
        logits: [N, vocab_size], any float dtype.
        drawn: [N], the sampled ids.
        index: [L] int64 on the device, the same as `rows`.
        rows: rows that ask.
        counts: how many of the most likely tokens each of them wants.
    """
    most = min(max(counts), logits.shape[1])
    parts = []
    for part in torch.split(index, _ROWS_AT_ONCE):
        values = torch.log_softmax(logits.index_select(0, part), -1, dtype=torch.float32)
        ids = drawn.index_select(0, part).to(torch.int64)[:, None]
        scores = values.gather(1, ids)
        if most:
            top = values.topk(most)
            ids, scores = torch.cat((ids, top.indices), 1), torch.cat((scores, top.values), 1)
        parts.append(torch.cat((ids.to(torch.int32), scores.view(torch.int32)), 1))
    return DeviceLogprobs(packed=torch.cat(parts), rows=rows, counts=counts)
