"""Puts the tokens of the step before where this step's inputs say so."""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import built_once

_BLOCK = 1024


def resolve_tokens(
    token_ids: torch.Tensor, source_rows: torch.Tensor, last_tokens: torch.Tensor
) -> torch.Tensor:
    """token_ids, or last_tokens[source_rows] where a source row is given.

    Args:
        token_ids: [T] int32.
        source_rows: [T] int32; -1: none.
        last_tokens: [n] int32.

    Returns:
        [T] int32.
    """
    out = torch.empty_like(token_ids)
    grid = (triton.cdiv(len(token_ids), _BLOCK),)
    _resolve[grid](token_ids, source_rows, last_tokens, out, len(token_ids), BLOCK=_BLOCK)
    return out


@built_once("count")
def _resolve(token_ids, source_rows, last_tokens, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    source = tl.load(source_rows + index, mask=inside, other=-1)
    given = tl.load(token_ids + index, mask=inside, other=0)
    drawn = tl.load(last_tokens + source, mask=inside & (source >= 0), other=0)
    tl.store(out + index, tl.where(source >= 0, drawn, given), mask=inside)
