"""Which bytes of a block each rank reads from which rank of a peer. Pure planning, once a peer.

The heads of a block are shared by the ranks of a worker, and two workers may have different numbers
of ranks. Called where a rank connects to a peer. Invariant: each byte of the own rank's block comes
from exactly one rank of the peer, whose pool holds the same head of the same layer there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from core.errors import TransferError
from core.kv_layout import KvLayout
from kvtransfer.transport import BlockPieces, Piece


@dataclass(frozen=True, slots=True)
class RankSlice:
    """What one own rank reads from one rank of a peer."""

    source_rank: int
    pieces: BlockPieces | None
    """None: whole blocks, which are alike on both sides."""


def layout_mismatch(own: KvLayout, peer: KvLayout) -> str:
    """How the blocks of two workers differ, of all heads each; empty if they hold the same."""
    differences = [
        f"{field.name} {getattr(peer, field.name)} instead of {getattr(own, field.name)}"
        for field in fields(KvLayout)
        if getattr(own, field.name) != getattr(peer, field.name)
    ]
    return ", ".join(differences)


def rank_heads(num_kv_heads: int, size: int, rank: int) -> range:
    """The KV heads that a rank of `size` holds; several ranks hold the same if heads are fewer.

    Raises:
        TransferError: so many heads can't be shared by so many ranks.
    """
    if size >= 1 and num_kv_heads % size == 0:
        count = num_kv_heads // size
        return range(rank * count, (rank + 1) * count)
    if size >= 1 and num_kv_heads >= 1 and size % num_kv_heads == 0:
        head = rank * num_kv_heads // size
        return range(head, head + 1)
    raise TransferError(
        f"{num_kv_heads} KV heads can't be shared by {size} ranks: give a tensor_parallel_size "
        "that divides the heads, or a multiple of their number."
    )


def rank_layout(layout: KvLayout, size: int) -> KvLayout:
    """Layout of the blocks of one of `size` ranks that share a model with blocks of `layout`.

    Raises:
        TransferError: see `rank_heads`.
    """
    return layout.with_heads(len(rank_heads(layout.num_kv_heads, size, 0)))


def plan_slices(
    layout: KvLayout, source_layout: KvLayout, *, source_size: int, own_size: int, own_rank: int
) -> tuple[RankSlice, ...]:
    """What `own_rank` reads, in the order of the peer's ranks.

    Of ranks that hold the same head, each is read by its share of the own ranks that need it.

    Args:
        layout: of the own model's blocks, with the heads of all ranks.
        source_layout: the same of the peer.
        source_size: ranks of the peer.
        own_size: ranks here.
        own_rank: which of them.

    Raises:
        TransferError: the blocks do not hold the same, or a size does not fit the heads.
    """
    assert 0 <= own_rank < own_size
    mismatch = layout_mismatch(layout, source_layout)
    if mismatch:
        raise TransferError(f"The peer's KV blocks differ: {mismatch}.")
    num_heads = layout.num_kv_heads
    own_heads = rank_heads(num_heads, own_size, own_rank)
    own_copies = max(1, own_size // num_heads)
    source_copies = max(1, source_size // num_heads)
    copy = own_rank % own_copies * source_copies // own_copies
    block_bytes = rank_layout(layout, source_size).block_bytes
    whole_block = [Piece(0, 0, rank_layout(layout, own_size).block_bytes)]
    slices = []
    for rank in range(source_size):
        heads = rank_heads(num_heads, source_size, rank)
        first, stop = max(heads.start, own_heads.start), min(heads.stop, own_heads.stop)
        if first >= stop or rank % source_copies != copy:
            continue
        pieces = _pieces(layout, source=heads, own=own_heads, shared=range(first, stop))
        whole = pieces == whole_block and block_bytes == whole_block[0].num_bytes
        slices.append(RankSlice(rank, None if whole else BlockPieces(block_bytes, tuple(pieces))))
    return tuple(slices)


def _pieces(layout: KvLayout, *, source: range, own: range, shared: range) -> Sequence[Piece]:
    """Runs of bytes of `shared` heads in a block of each side, [layers, 2, heads, ...]."""
    parts = layout.num_layers * 2
    head_bytes = layout.block_bytes // (parts * layout.num_kv_heads)
    pieces: list[Piece] = []
    for part in range(parts):
        piece = Piece(
            (part * len(source) + shared.start - source.start) * head_bytes,
            (part * len(own) + shared.start - own.start) * head_bytes,
            len(shared) * head_bytes,
        )
        if pieces and pieces[-1].joins(piece):
            piece = Piece(*pieces[-1][:2], pieces.pop().num_bytes + piece.num_bytes)
        pieces.append(piece)
    return pieces
