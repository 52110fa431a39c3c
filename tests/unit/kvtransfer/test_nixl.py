"""NIXL's transport where no peer is needed: how blocks are cut into descriptors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from kvtransfer.nixl import NixlTransport
from kvtransfer.nixl_pool import NixlPool, cut_pieces
from kvtransfer.transport import Piece
from tests.support.kv import HostPool


@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 40)).map(
            lambda numbers: Piece(*numbers)
        ),
        max_size=5,
    ),
    st.integers(1, 50),
)
def test_cut_pieces_are_the_same_bytes_and_as_few_as_can_be(pieces: list[Piece], most: int) -> None:
    def moves(each: list[Piece]) -> list[tuple[int, int]]:
        return [(remote + i, own + i) for remote, own, size in each for i in range(size)]

    cut = cut_pieces(pieces, most)
    assert moves(list(cut)) == moves(pieces)
    assert all(0 < piece.num_bytes <= most for piece in cut)
    assert len(cut) == sum(-(-piece.num_bytes // most) for piece in pieces)


def test_a_row_stands_for_one_run_of_every_block() -> None:
    pool = NixlPool(base_address=1 << 40, num_blocks=10, block_bytes=4096, device_id=3)
    assert pool.descriptors([(0, 512), (1024, 8)]).tolist() == [
        [1 << 40, 512, 3, 4096, 10],
        [(1 << 40) + 1024, 8, 3, 4096, 10],
    ]


def test_a_descriptor_moves_something() -> None:
    with pytest.raises(TransferError, match="at least 1, got 0"):
        NixlTransport(HostPool(1, 1 << 18), token=b"", descriptor_bytes=0)
