"""In which order a step's rows come, and how they are divided among kernels."""

import numpy as np

from engine.cuda.attention import RowCounts, row_order
from engine.plan import Chunk


def chunk(start: int, count: int) -> Chunk:
    return Chunk("any", [1] * count, start, [], None)


def test_decodes_come_first_the_longest_before_all_then_resumed_then_fresh_prompts() -> None:
    step = [chunk(0, 7), chunk(30, 1), chunk(8, 5), chunk(0, 4), chunk(90, 1), chunk(4, 2)]
    assert row_order(step) == [4, 1, 2, 5, 0, 3]


def test_decodes_as_long_as_each_other_keep_their_order() -> None:
    assert row_order([chunk(5, 1)] * 4) == [0, 1, 2, 3]


def test_a_prompt_of_one_token_is_a_row_like_any_decode() -> None:
    assert row_order([chunk(0, 1), chunk(3, 1)]) == [1, 0]


def test_rows_end_where_the_next_kind_begins() -> None:
    lengths = np.array([1, 1, 5, 2, 7], np.int32)
    assert RowCounts(lengths, num_decodes=2, num_resumed=2).ends == (2, 9)
    assert RowCounts(lengths[2:], num_decodes=0, num_resumed=0).ends == (0, 0)
