"""A block pool as the bytes that a transport copies. Used by the transports of this package."""

import ctypes
from collections.abc import Iterable, Iterator, Sequence

from core.errors import TransferError
from kvtransfer.transport import BlockPieces, BlockPool, Piece


def pool_view(pool: BlockPool) -> memoryview:
    """The whole pool as writable bytes, [num_blocks * block_bytes]. Host memory only.

    The view keeps `pool` alive, and with it memory that the pool owns.
    """
    num_bytes = pool.num_blocks * pool.layout.block_bytes
    memory = (ctypes.c_char * num_bytes).from_address(pool.base_address)
    memory.owner = pool  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def check_ids(ids: Sequence[int], num_blocks: int, whose: str) -> None:
    """Raise TransferError unless every id, of one at least, names a block of a pool."""
    for block in (min(ids), max(ids)):
        if not 0 <= block < num_blocks:
            raise TransferError(f"Block {block} is outside {whose} pool of {num_blocks} blocks.")


def check_distinct(ids: Sequence[int]) -> None:
    """Raise TransferError if an own block would be filled twice by one READ."""
    if len(set(ids)) != len(ids):
        raise TransferError("One READ names the same own block twice.")


def checked_pieces(
    own_block_bytes: int, peer_block_bytes: int, pieces: BlockPieces | None
) -> tuple[Piece, ...]:
    """The pieces to copy from every block of a peer whose blocks have that size; whole blocks: one.

    Raises:
        TransferError: the peer's blocks have another size than was planned for, or a piece lies
            outside its block or overlaps the one before it in the own block.
    """
    expected = own_block_bytes if pieces is None else pieces.remote_block_bytes
    if peer_block_bytes != expected:
        raise TransferError(f"The peer's blocks hold {peer_block_bytes} bytes, not {expected}.")
    if pieces is None:
        return (Piece(0, 0, own_block_bytes),)
    own_end = 0
    for remote, own, num_bytes in pieces.pieces:
        fits = remote >= 0 and own >= own_end and num_bytes > 0
        own_end = own + num_bytes
        if not fits or remote + num_bytes > peer_block_bytes or own_end > own_block_bytes:
            raise TransferError(
                f"A piece of {num_bytes} bytes from {remote} of a peer's block of "
                f"{peer_block_bytes} does not fit at {own} of an own block of {own_block_bytes}."
            )
    if not pieces.pieces:
        raise TransferError("A connection was asked for that reads nothing of any block.")
    return pieces.pieces


def block_slices(
    view: memoryview, ids: Iterable[int], block_bytes: int, runs: Sequence[tuple[int, int]]
) -> Iterator[memoryview]:
    """The runs of each block in the given order, neighbours joined into one slice.

    Args:
        view: a pool's bytes.
        ids: of its blocks.
        block_bytes: size of a block.
        runs: (offset in a block, number of bytes) each.
    """
    start = stop = 0
    for block in ids:
        for offset, num_bytes in runs:
            first = block * block_bytes + offset
            if first != stop:
                if start < stop:
                    yield view[start:stop]
                start = first
            stop = first + num_bytes
    if start < stop:
        yield view[start:stop]
