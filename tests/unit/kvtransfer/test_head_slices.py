"""Plans of head slices: carried out on real bytes, they equal sharding the whole tensor anew."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from core.errors import TransferError
from core.kv_layout import KvLayout
from kvtransfer.head_slices import RankSlice, layout_mismatch, plan_slices, rank_heads, rank_layout
from kvtransfer.transport import Piece
from tests.support.kv_ranks import BLOCK_SIZE, HEAD_DIM, fits, share, whole_layout

MAX_SIZE = 8


def plan(whole: KvLayout, source_size: int, own_size: int, rank: int) -> tuple[RankSlice, ...]:
    return plan_slices(whole, whole, source_size=source_size, own_size=own_size, own_rank=rank)


CASES = [
    (layers, heads, source_size, own_size)
    for layers, heads, source_size, own_size in product(
        (1, 2, 3), (1, 2, 3, 4, 6, 8), range(1, MAX_SIZE + 1), range(1, MAX_SIZE + 1)
    )
    if fits(heads, source_size) and fits(heads, own_size)
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_slices_copied_from_the_ranks_equal_sharding_the_whole_block_anew(dtype: str) -> None:
    rng = np.random.default_rng(3)
    for layers, heads, source_size, own_size in CASES:
        whole = whole_layout(layers, heads, dtype)
        shape = (1, layers, 2, heads, BLOCK_SIZE, HEAD_DIM)
        block = rng.permutation(np.arange(np.prod(shape))).astype(dtype).reshape(shape)
        sources = [share(block, source_size, rank)[0] for rank in range(source_size)]
        own_bytes = rank_layout(whole, own_size).block_bytes
        for rank in range(own_size):
            own = np.zeros(own_bytes, np.uint8)
            written = np.zeros(own_bytes, int)
            for source_rank, pieces in (
                (each.source_rank, each.pieces) for each in plan(whole, source_size, own_size, rank)
            ):
                source = sources[source_rank]
                runs = (Piece(0, 0, own_bytes),)
                if pieces is None:
                    assert len(source) == own_bytes
                else:
                    assert pieces.remote_block_bytes == len(source)
                    runs = pieces.pieces
                for remote, at, length in runs:
                    assert remote + length <= len(source)
                    own[at : at + length] = source[remote : remote + length]
                    written[at : at + length] += 1
            assert (written == 1).all(), "each byte once"
            assert (own == share(block, own_size, rank)[0]).all()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_equal_sizes_read_whole_blocks_from_the_same_rank(size: int) -> None:
    for heads, rank in product((1, 2, 4, 8), range(size)):
        assert plan(whole_layout(2, heads), size, size, rank) == (RankSlice(rank, None),)


def test_runs_are_as_long_as_they_can_be() -> None:
    whole = whole_layout(3, 4)
    head = BLOCK_SIZE * HEAD_DIM * 2
    (from_one,) = plan(whole, 1, 2, 1)
    assert from_one.pieces is not None
    assert from_one.pieces.pieces == tuple(
        Piece((4 * part + 2) * head, 2 * part * head, 2 * head) for part in range(6)
    )
    first, second = plan(whole, 2, 1, 0)
    assert (first.source_rank, second.source_rank) == (0, 1)
    assert second.pieces is not None
    assert second.pieces.pieces[1] == Piece(2 * head, 6 * head, 2 * head)


def test_ranks_that_hold_the_same_heads_are_read_evenly() -> None:
    whole = whole_layout(1, 2)
    read = [plan(whole, 8, 8, rank)[0].source_rank for rank in range(8)]
    assert read == list(range(8))
    read = [plan(whole, 4, 8, rank)[0].source_rank for rank in range(8)]
    assert read == [0, 0, 1, 1, 2, 2, 3, 3]
    read = [plan(whole, 8, 4, rank)[0].source_rank for rank in range(4)]
    assert read == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 3}, "num_layers 3 instead of 2"),
        ({"block_size": 4}, "block_size 4 instead of 2"),
        ({"head_dim": 6}, "head_dim 6 instead of 3"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 instead of float16"),
        ({"num_kv_heads": 2, "block_bytes": 1}, "num_kv_heads 2 instead of 4, block_bytes 1"),
    ],
)
def test_blocks_that_do_not_hold_the_same_are_refused(change: dict[str, Any], said: str) -> None:
    own = whole_layout(2, 4)
    peer = replace(own, **change)
    assert said in layout_mismatch(own, peer)
    assert layout_mismatch(own, own) == ""
    with pytest.raises(TransferError, match=said):
        plan_slices(own, peer, source_size=1, own_size=2, own_rank=0)


@pytest.mark.parametrize(("heads", "size"), [(4, 3), (3, 2), (2, 3), (6, 4), (4, 0), (4, -1)])
def test_sizes_that_do_not_fit_the_heads_are_refused(heads: int, size: int) -> None:
    whole = whole_layout(1, heads)
    with pytest.raises(TransferError, match=f"{heads} KV heads can't be shared by {size} ranks"):
        rank_heads(heads, size, 0)
    with pytest.raises(TransferError, match="shared"):
        plan_slices(whole, whole, source_size=size, own_size=1, own_rank=0)
