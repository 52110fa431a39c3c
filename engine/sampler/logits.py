"""Changes to the logits of one row that a request's settings ask for, before temperature."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.plan import SampleSpec, TokenMask


def is_plain(spec: SampleSpec) -> bool:
    """True if the row's logits are used as the model gave them."""
    params = spec.params
    return not (params.penalised or params.logit_bias or spec.banned_ids) and spec.mask is None


def modify_(row: torch.Tensor, spec: SampleSpec) -> None:
    """Apply penalties, then bias, then bans, then the mask to `row` [vocab_size] in place.

    Source: repetition penalty arXiv:1909.05858; presence and frequency penalties and bias as the
    OpenAI API documents them. Ids outside the vocabulary are ignored.
    """
    params = spec.params
    if params.repetition_penalty != 1:
        ids = torch.unique(_ids((*spec.prompt_ids, *spec.output_ids), row))
        values = row[ids]
        penalty = params.repetition_penalty
        row[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = torch.unique(_ids(spec.output_ids, row), return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts.to(row.dtype)
    if params.logit_bias:
        known = {i: bias for i, bias in params.logit_bias.items() if 0 <= i < len(row)}
        row[_ids(tuple(known), row)] += torch.tensor(
            tuple(known.values()), dtype=row.dtype, device=row.device
        )
    if spec.banned_ids:
        row[_ids(spec.banned_ids, row)] = float("-inf")
    if spec.mask is not None:
        row.masked_fill_(_forbidden(spec.mask, row), float("-inf"))


def _forbidden(mask: TokenMask, row: torch.Tensor) -> torch.Tensor:
    """True where the mask does not allow the token, [vocab_size]."""
    allowed = np.unpackbits(mask.words().view(np.uint8), count=len(row), bitorder="little")
    return torch.from_numpy(allowed).to(row.device) == 0


def _ids(values: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor(values, dtype=torch.int64, device=row.device)
    return ids[(ids >= 0) & (ids < len(row))]
