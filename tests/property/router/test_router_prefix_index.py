"""The index against the obvious model: hashes and predictions of each worker by themselves."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.fleet.worker import CacheChange
from router.placement.prefix_index import Applied, PrefixIndex
from router.placement.prefix_walk import Held

WORKERS = ("a", "b", "c")
BLOCKS = [bytes([value]) * 16 for value in range(6)]
TTL_S = 10.0

workers = st.sampled_from(WORKERS)
skips = st.integers(-1, 1)
blocks = st.lists(st.sampled_from(BLOCKS), max_size=4, unique=True)


class IndexAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(prediction_ttl_s=TTL_S)
        self.now = 0.0
        self.known: dict[str, set[bytes]] = {}
        self.host: dict[str, set[bytes]] = {}
        self.predicted: dict[str, dict[bytes, int]] = {}
        self.sequence: dict[str, tuple[int, int] | None] = {}

    def present(self, worker: str) -> bool:
        return worker in self.known

    @rule(worker=workers, epoch=st.integers(1, 3))
    def add(self, worker: str, epoch: int) -> None:
        self.index.add(worker, epoch)
        self.forget(worker)

    def forget(self, worker: str) -> None:
        self.known[worker], self.host[worker], self.predicted[worker] = set(), set(), {}
        self.sequence[worker] = None

    @rule(worker=workers)
    def drop(self, worker: str) -> None:
        self.index.drop(worker)
        for table in (self.known, self.host, self.predicted, self.sequence):
            table.pop(worker, None)  # type: ignore[attr-defined]

    @rule(
        worker=workers, epoch=st.integers(1, 3), seq=st.integers(0, 5), stored=blocks, host=blocks
    )
    def snapshot(
        self, worker: str, epoch: int, seq: int, stored: list[bytes], host: list[bytes]
    ) -> None:
        change = CacheChange(
            epoch=epoch, seq=seq, reset=True, stored=stored, removed=[], host_stored=host
        )
        applied = self.index.apply(worker, change)
        if not self.present(worker):
            assert applied is Applied.IGNORED
            return
        assert applied is Applied.APPLIED
        self.known[worker], self.host[worker], self.predicted[worker] = set(stored), set(host), {}
        self.sequence[worker] = (epoch, seq)

    @rule(
        worker=workers,
        skip=st.integers(-1, 1),
        stored=blocks,
        removed=blocks,
        host_stored=blocks,
        host_removed=blocks,
        other=st.booleans(),
    )
    def event(
        self,
        worker: str,
        skip: int,
        stored: list[bytes],
        removed: list[bytes],
        host_stored: list[bytes],
        host_removed: list[bytes],
        other: bool,
    ) -> None:
        epoch, seq = self.sequence.get(worker) or (1, 0)
        seq += 1 + skip
        epoch += other
        removed = [block for block in removed if block not in stored]
        host_removed = [block for block in host_removed if block not in host_stored]
        change = CacheChange(
            epoch=epoch,
            seq=seq,
            reset=False,
            stored=stored,
            removed=removed,
            host_stored=host_stored,
            host_removed=host_removed,
        )
        applied = self.index.apply(worker, change)
        if not self.present(worker):
            assert applied is Applied.IGNORED
        elif self.sequence[worker] is None or other or skip > 0:
            assert applied is Applied.NEEDS_RESYNC
            self.forget(worker)
        elif skip < 0:
            assert applied is Applied.IGNORED
        else:
            assert applied is Applied.APPLIED
            self.sequence[worker] = (epoch, seq)
            self.known[worker] = (self.known[worker] - set(removed)) | set(stored)
            self.host[worker] = (self.host[worker] - set(host_removed)) | set(host_stored)
            for block in (*stored, *removed, *host_stored, *host_removed):
                self.predicted[worker].pop(block, None)

    @rule(worker=workers, hashes=blocks)
    def predict(self, worker: str, hashes: list[bytes]) -> None:
        self.index.predict([worker], hashes, self.now)
        if self.present(worker):
            for block in hashes:
                if block not in self.known[worker] | self.host[worker]:
                    self.predicted[worker][block] = int(self.now // (TTL_S / 2))

    @rule(passed=st.floats(0, 7))
    def wait(self, passed: float) -> None:
        self.now += passed
        self.index.expire(self.now)
        turn = int(self.now // (TTL_S / 2))
        for predicted in self.predicted.values():
            for block in [block for block, made in predicted.items() if made < turn - 1]:
                del predicted[block]

    @precondition(lambda self: self.known)
    @rule(hashes=blocks)
    def match(self, hashes: list[bytes]) -> None:
        wanted = {}
        for worker in self.known:
            held = self.known[worker] | self.host[worker] | set(self.predicted[worker])
            length = 0
            while length < len(hashes) and hashes[length] in held:
                length += 1
            if length:
                lower = self.host[worker] - self.known[worker]
                wanted[worker] = Held(length, sum(block in lower for block in hashes[:length]))
        assert self.index.match(hashes) == wanted

    @invariant()
    def holds_nothing_else(self) -> None:
        held = set().union(*self.known.values(), *self.host.values(), *self.predicted.values())
        assert len(self.index) == len(held)


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
