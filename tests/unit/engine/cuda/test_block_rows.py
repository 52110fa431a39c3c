"""Kept block tables against the tables themselves, through any life of any requests."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cuda.block_rows import BlockRows
from engine.plan import Chunk

NAMES = st.sampled_from("abcdefgh")
IDS = st.lists(st.integers(0, (1 << 31) - 1), min_size=1, max_size=40)


def chunk(name: str, table: list[int]) -> Chunk:
    return Chunk(name, [0], 0, table, None)


class Tables(RuleBasedStateMachine):
    """Tables grow, are given up for others, and are asked for in part, in any order."""

    @initialize(max_requests=st.integers(1, 3))
    def start(self, max_requests: int) -> None:
        self.rows = BlockRows(max_requests)
        self.tables: dict[str, list[int]] = {}
        self.max_requests = max_requests
        self.seen: set[str] = set()

    @rule(name=NAMES, ids=IDS)
    def replace(self, name: str, ids: list[int]) -> None:
        """A new request, or one that lost its blocks: another list, possibly of equal content."""
        self.tables[name] = list(ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), ids=IDS)
    def grow(self, data: st.DataObject, ids: list[int]) -> None:
        self.tables[data.draw(st.sampled_from(sorted(self.tables)))].extend(ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tables)))
        table = self.tables[name]
        count = data.draw(st.integers(0, len(table)))
        found = self.rows.array(chunk(name, table), count)
        assert found.tolist() == table[:count]
        self.seen.add(name)

    @rule(names=st.sets(NAMES))
    def forget(self, names: set[str]) -> None:
        step = [chunk(name, self.tables[name]) for name in sorted(names & self.tables.keys())]
        self.rows.forget_all_but(step)
        if len(self.seen) > 2 * self.max_requests:
            self.seen &= names

    @invariant()
    def nothing_else_is_kept(self) -> None:
        assert set(self.rows._rows) == self.seen


Tables.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTables = Tables.TestCase


def test_table_of_equal_content_is_not_taken_for_the_one_before() -> None:
    rows = BlockRows(4)
    first, second = [1, 2, 3], [1, 2, 3]
    rows.array(chunk("a", first), 3)
    second[0] = 9
    assert rows.array(chunk("a", second), 3).tolist() == [9, 2, 3]


def test_many_requests_are_not_all_kept() -> None:
    rows, tables = BlockRows(4), {f"r{i}": [i] for i in range(100)}
    for name, table in tables.items():
        step = [chunk(name, table)]
        rows.forget_all_but(step)
        rows.array(step[0], 1)
    assert len(rows._rows) <= 2 * 4 + 1
