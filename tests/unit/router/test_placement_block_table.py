import numpy as np

from router.placement.block_table import FIRST_CAPACITY, GROUP, BlockTable, Keys


def test_of_keys_that_all_want_one_group_it_keeps_as_many_as_fit() -> None:
    rng = np.random.default_rng(0)
    table = BlockTable()
    keys: Keys = rng.integers(1, 1 << 60, 2 * GROUP, np.uint64)  # the lowest group of 16
    for part in np.array_split(keys, 4):
        table.change(part, lambda before: before + 7)
    found = table.get(keys)
    assert ((found == 0) | (found == 7)).all() and (found == 7).sum() == GROUP


def test_a_growing_table_moves_no_more_than_is_due_for_who_is_in_a_hurry() -> None:
    table, rng = BlockTable(), np.random.default_rng(0)
    keys: Keys = rng.integers(1, 1 << 63, 3 * FIRST_CAPACITY // 4, np.uint64) << np.uint64(1)
    wanted, grown_at = 0, 0
    for part in np.array_split(keys, 64):
        table.change(part, lambda before: before + 1)
        wanted += len(part)
        table.tidy(wanted, np.ones(2, np.bool_), 1, hurried=True)
        grown_at = grown_at or (wanted if table.num_bytes > 12 * FIRST_CAPACITY else 0)
        assert (table.get(keys[:wanted]) == 1).all()
    assert grown_at and table.num_bytes == 36 * FIRST_CAPACITY, "hardly anything was due"
    for _ in range(FIRST_CAPACITY // GROUP):
        table.tidy(wanted, np.ones(2, np.bool_), 1, hurried=False)
    assert table.num_bytes == 24 * FIRST_CAPACITY
    assert (table.get(keys) == 1).all()
