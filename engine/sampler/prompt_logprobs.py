"""Log probabilities of prompt tokens, from the hidden states of the tokens before them.

Both runners call this after the last layer. All logits of a long prompt would not fit in memory, so
they are computed, looked at and dropped a few rows at a time; nothing here waits for the device
but `PromptScores.results`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from core.tokens import PromptLogprobs
from engine.plan import Chunk, ScoreSpec

_ROWS_AT_ONCE = 128
"""So that their float32 log probabilities take 78 MB at 152k tokens, however long the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Of all chunks of a step that report."""

    packed: torch.Tensor
    """[R, 2 + 2 * most] int32: bits of the float32 log probability, rank, ids of the most likely
    tokens, bits of their log probabilities."""
    specs: Sequence[tuple[int, ScoreSpec]]
    """(index of the chunk, what it reports), in the order of the rows."""

    def results(self) -> dict[int, PromptLogprobs]:
        """By index of the chunk; `packed` must be in host memory."""
        table = self.packed.numpy()
        most = table.shape[1] // 2 - 1
        results = {}
        start = 0
        for index, spec in self.specs:
            rows = table[start : start + len(spec.token_ids)]
            start += len(rows)
            num_top = min(spec.num_top, most)
            results[index] = PromptLogprobs(
                first=spec.first,
                logprobs=rows[:, 0].view(np.float32).tolist(),
                ranks=rows[:, 1].tolist(),
                num_top=num_top,
                top_ids=rows[:, 2 : 2 + num_top].reshape(-1).tolist(),
                top_logprobs=rows[:, 2 + most : 2 + most + num_top]
                .view(np.float32)
                .reshape(-1)
                .tolist(),
            )
        return results


def score_prompts(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    chunks: Sequence[Chunk],
    first_rows: Sequence[int],
) -> PromptScores:
    """Queue what the chunks with a ScoreSpec report; there is at least one.

    Args:
        logits_of: [N, hidden_size], normed -> [N, vocab_size].
        hidden: [T, hidden_size], normed, of all tokens of the step.
        chunks: of the step.
        first_rows: row of each chunk's first token.
    """
    specs = [(i, chunk.score) for i, chunk in enumerate(chunks) if chunk.score is not None]
    targets = torch.tensor([each for _, spec in specs for each in spec.token_ids])
    if hidden.is_cuda:
        targets = targets.pin_memory().to(hidden.device, non_blocking=True)
    most = max(spec.num_top for _, spec in specs)
    parts = []
    done = 0
    for index, spec in specs:
        first = first_rows[index] + spec.first - 1 - chunks[index].start
        rows = hidden[first : first + len(spec.token_ids)]
        for part in rows.split(_ROWS_AT_ONCE):
            parts.append(_score(logits_of(part), targets[done : done + len(part)], most))
            done += len(part)
    return PromptScores(packed=torch.cat(parts), specs=specs)


def _score(logits: torch.Tensor, targets: torch.Tensor, most: int) -> torch.Tensor:
    """[N, vocab_size] and [N] ids -> packed [N, 2 + 2 * most]."""
    values = torch.log_softmax(logits, -1, dtype=torch.float32)
    scores = values.gather(1, targets[:, None])
    ranks = (values > scores).sum(1, keepdim=True, dtype=torch.int32) + 1
    columns = [scores.view(torch.int32), ranks]
    if most:
        top = values.topk(min(most, values.shape[1]))
        columns += [top.indices.to(torch.int32), top.values.view(torch.int32)]
    return torch.cat(columns, 1)
