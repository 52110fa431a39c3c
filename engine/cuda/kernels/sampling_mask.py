"""Forbids the tokens that a row's mask of bits does not allow. The device form of a TokenMask."""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, built_once, overlap
from engine.cuda.kernels.sampling import CHUNK

_WORD_BITS = tl.constexpr(32)


def forbid(
    logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor, *, chunk: int = CHUNK
) -> None:
    """Make forbidden logits minus infinity, in place. Reads the masks and writes what they forbid.

    Args:
        logits: [N, vocab_size] float32, rows of any stride.
        rows: [M] int64, which row of the logits each mask is for.
        masks: [M, W] int32 with W * 32 >= vocab_size; bit t % 32 of word t // 32 allows token t.
        chunk: logits per program, a power of two of at least 32.
    """
    count, vocab_size = len(rows), logits.shape[1]
    assert masks.shape[1] * 32 >= vocab_size and logits.stride(1) == masks.stride(1) == 1
    _forbid[(triton.cdiv(vocab_size, chunk), count)](
        logits,
        rows,
        masks,
        logits.stride(0),
        masks.stride(0),
        vocab_size,
        CHUNK=chunk,
        num_warps=4,
        **overlap(logits),
    )


@built_once("rows", "masks")
def _forbid(
    logits,
    rows,
    masks,
    stride,
    mask_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    mask = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = column < vocab_size
    await_previous(OVERLAP)
    row = tl.load(rows + mask)
    # Threads of a warp share each word, so it is fetched once.
    words = tl.load(masks + mask * mask_stride + column // _WORD_BITS, mask=inside, other=-1)
    forbidden = ((words >> (column % _WORD_BITS)) & 1) == 0
    nothing = tl.full((CHUNK,), float("-inf"), tl.float32)
    tl.store(logits + row * stride + column, nothing, mask=inside & forbidden)
