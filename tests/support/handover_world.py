"""Both state machines of the hand-over, joined by FIFO links over a model of block memory.

Knows what the world may do in a scenario (messages delayed or lost with their link, READs landing
late or never, loops that stand still while time passes, aborts on either side) and checks the
design's promises after each step. Explored by tests/support/handover_explorer.py.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from core.errors import ErrorCode
from core.kv_layout import KvLayout
from kvtransfer import actions as act
from kvtransfer.export import ExportMachine
from kvtransfer.handover import HandoverMachine
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.messages import Claim, DecodeMessage, Hello, Key, PrefillMessage, Probe, Release
from tests.support.handover_scenario import Scenario

TTL = 6
GARBAGE = (Key("nobody", 0), 0)
NUM_BLOCKS = 2
"""Blocks, and tokens, of every prompt."""
LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="float32", block_bytes=4
)
CLOSED = "closed"
FIRST_LINK = 1


def hello(worker_id: str, ttl_s: float) -> Hello:
    return Hello(
        worker_id=worker_id,
        epoch=1,
        model_digest=b"d",
        layout=LAYOUT,
        num_blocks=64,
        transport="model",
        lease_ttl_s=ttl_s,
    )


class Violation(AssertionError):
    """A promise was broken."""


class NoCounter:
    """Counts nothing, so that equal states look equal."""

    def __getitem__(self, name: str) -> int:
        return 0

    def __setitem__(self, name: str, count: int) -> None:
        pass


@dataclass
class PendingRead:
    key: Key
    number: int
    peer_id: str
    pairs: tuple[tuple[int, int], ...]
    stamped: bool
    landed: bool = False


@dataclass
class World:
    """One state of everything."""

    scenario: Scenario
    time: float = 0
    ticks: int = 0
    export: ExportMachine = field(init=False)
    handover: HandoverMachine = field(init=False)
    to_prefill: dict[int, deque[DecodeMessage | str]] = field(default_factory=dict)
    to_decode: dict[int, deque[PrefillMessage | str]] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    prefill_memory: dict[int, tuple[Key, int]] = field(default_factory=dict)
    """Prefill's block to (key, index) whose KV it holds."""
    held: dict[int, int] = field(default_factory=dict)
    computing: dict[Key, int] = field(default_factory=dict)
    """Key to number of blocks complete, while its engine works on it."""
    prefilled: set[Key] = field(default_factory=set)
    decode_memory: dict[int, tuple[Key, int]] = field(default_factory=dict)
    asked: set[Key] = field(default_factory=set)
    """What decode was told to fetch."""
    waiting: set[Key] = field(default_factory=set)
    reserved: set[Key] = field(default_factory=set)
    reads: list[PendingRead] = field(default_factory=list)
    claims: dict[Key, int] = field(default_factory=dict)
    released: set[Key] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    """Links that decode did not close itself."""
    aborted: set[Key] = field(default_factory=set)
    failed: set[Key] = field(default_factory=set)
    claimed: set[Key] = field(default_factory=set)
    """What prefill has heard a Claim of."""
    enough: set[Key] = field(default_factory=set)
    """Requests that their first token ended: decode must not speak of them."""
    withdrawn: set[Key] = field(default_factory=set)
    proven: set[str] = field(default_factory=set)
    """Peers whose test block came as it was sent, or that can't be tested."""
    ended: dict[Key, str] = field(default_factory=dict)
    frozen: bool = False
    probing: Key | None = None
    """The probe that has not ended yet."""
    probe_ends: list[act.ProbeOutcome] = field(default_factory=list)
    prefill_turn: float = 0
    decode_turn: float = 0

    def __post_init__(self) -> None:
        self.export = ExportMachine(hello("P", TTL))
        config = HandoverConfig(
            drift_ratio=self.scenario.drift_ratio,
            read_margin_s=0.5,
            peer_silence_s=4,
            open_timeout_s=4,
            read_timeout_s=3,
            max_inflight_blocks=NUM_BLOCKS,
            idle_link_s=5,
            probe_blocks=NUM_BLOCKS if self.scenario.probes else 0,
            probe_interval_s=2,
            test_links=self.scenario.proves,
        )
        self.handover = HandoverMachine(hello("D", 0), config)
        self.export.counters = NoCounter()  # type: ignore[assignment]
        self.handover.counters = NoCounter()  # type: ignore[assignment]
        for key in self.keys:
            if not (self.scenario.probes and key.attempt):
                self.submit_decode(key)
            if not self.scenario.late_submit:
                self.submit_prefill(key)

    @property
    def keys(self) -> list[Key]:
        return [Key("r", attempt) for attempt in range(self.scenario.num_keys)]

    @property
    def decode_now(self) -> float:
        return self.time * self.scenario.decode_clock_rate

    # What may happen next.

    def events(self) -> Iterator[tuple[str, Callable[["World"], None]]]:
        """Everything that may happen in this state."""
        for link in self.to_prefill:
            if self.to_prefill[link]:
                yield f"prefill hears {link}", lambda w, n=link: w.prefill_hears(n)  # type: ignore[misc]
        for link in self.to_decode:
            if self.to_decode[link]:
                yield f"decode hears {link}", lambda w, n=link: w.decode_hears(n)  # type: ignore[misc]
            if self.scenario.link_breaks and not self.broken:
                yield f"break {link}", lambda w, n=link: w.break_link(n, True)  # type: ignore[misc]
                yield f"lose {link}", lambda w, n=link: w.break_link(n, False)  # type: ignore[misc]
        for i, read in enumerate(self.reads):
            if not (read.landed or self.frozen):
                yield f"land {i}", lambda w, n=i: w.land(n)  # type: ignore[misc]
            if read.landed or self.scenario.reads_fail:
                yield f"poll {i}", lambda w, n=i: w.poll(n)  # type: ignore[misc]
        for key in self.keys:
            for name, event in self.key_events(key):
                yield f"{name} {key.attempt}", lambda w, k=key, e=event: e(w, k)  # type: ignore[misc]
        if self.prefill_turn < self.time:
            yield "prefill turns", World.turn_prefill
        if self.decode_turn < self.time:
            yield "decode turns", World.turn_decode
        if self.ticks < self.scenario.last_time:
            yield "time", World.advance

    def key_events(self, key: Key) -> Iterator[tuple[str, Callable[["World", Key], None]]]:
        if key not in self.prefilled and key not in self.computing:
            yield "submit", World.submit_prefill
        if key in self.computing:
            if self.computing[key] < NUM_BLOCKS:
                yield "progress", World.progress
            else:
                yield "commit", World.commit
                if self.scenario.enough:
                    yield "enough", World.be_enough
        if self.scenario.prefill_fails and key not in self.failed:
            yield "prefill fails", World.fail_prefill
        if self.scenario.withdraws and key in self.asked and key not in self.withdrawn:
            yield "withdraw", World.withdraw
        given_up = key in self.enough or key in self.withdrawn
        if given_up and key in self.asked and key not in self.aborted:
            yield "router aborts", World.abort_decode
        if key not in self.asked:
            yield "decode is asked", World.submit_decode
        elif self.scenario.decode_aborts and key not in self.aborted:
            yield "decode aborts", World.abort_decode
        if key in self.waiting:
            yield "reserve", World.reserve

    def advance(self) -> None:
        self.time += self.scenario.time_step
        self.ticks += 1

    # Prefill.

    def submit_prefill(self, key: Key) -> None:
        self.computing[key] = 0
        self.prefill(self.export.submitted(key, "D", NUM_BLOCKS, self.time))

    def blocks_of(self, key: Key) -> list[int]:
        first = NUM_BLOCKS * (key.attempt if key in self.keys else self.scenario.num_keys)
        return [first + i for i in range(NUM_BLOCKS)]

    def progress(self, key: Key) -> None:
        index = self.computing[key]
        block = self.blocks_of(key)[index]
        self.prefill_memory[block] = (key, index)
        self.held[block] = self.held.get(block, 0) + 1
        self.computing[key] += 1
        self.prefill(self.export.progressed(key, [block], self.time))

    def commit(self, key: Key) -> None:
        self.prefill(self.export.committed(key, 7, None, 0, self.time))
        self.stop_computing(key)

    def be_enough(self, key: Key) -> None:
        self.enough.add(key)
        self.prefill(self.export.enough(key, self.time))
        self.stop_computing(key)

    def withdraw(self, key: Key) -> None:
        """What the router says to prefill; to decode it says Abort, perhaps later."""
        self.withdrawn.add(key)
        self.prefill(self.export.withdrawn(key, 0))
        if key not in self.claimed and key not in self.computing:
            held = any(self.held.get(block) for block in self.blocks_of(key))
            self.require(not held, "a prompt that nobody will claim keeps its blocks")

    def fail_prefill(self, key: Key) -> None:
        self.failed.add(key)
        self.stop_computing(key)
        self.prefill(self.export.failed(key, ErrorCode.KV_TRANSFER, "aborted", self.time))

    def stop_computing(self, key: Key) -> None:
        if self.computing.pop(key, None) is not None:
            self.prefilled.add(key)
        self.prefilled.add(key)
        self.reuse_free_blocks()

    def reuse_free_blocks(self) -> None:
        for key in self.keys:
            if key not in self.computing:
                for block in self.blocks_of(key):
                    if not self.held.get(block):
                        self.prefill_memory[block] = GARBAGE
        for block in [block for block, holds in self.held.items() if not holds]:
            if self.prefill_memory[block][0] not in self.keys:
                self.prefill_memory[block] = GARBAGE

    def turn_prefill(self) -> None:
        self.prefill_turn = self.time
        self.prefill(self.export.expire(self.time))

    def prefill_hears(self, link: int) -> None:
        message = self.to_prefill[link].popleft()
        if isinstance(message, str):
            self.prefill(self.export.link_closed(link, self.time))
        else:
            if isinstance(message, Claim):
                self.claimed.add(message.key)
            self.prefill(self.export.received(link, message, self.time))

    def prefill(self, actions: list[act.ExportAction]) -> None:
        for action in actions:
            match action:
                case act.Send(link, message):
                    if link not in self.broken:
                        self.to_decode[link].append(message)
                case act.CloseLink(link, _):
                    self.break_link(link, True)
                case act.FreeBlocks(_, block_ids):
                    for block in block_ids:
                        self.held[block] -= 1
                        self.require(self.held[block] >= 0, f"block {block} freed twice")
                    self.reuse_free_blocks()
                case act.CancelPrefill(key, _, _):
                    self.require(key in self.keys, "a probe was taken for a prompt")
                    self.stop_computing(key)
                case act.ReserveScratch(key, count):
                    self.lend_scratch(key, count)

    def lend_scratch(self, key: Key, count: int) -> None:
        """Blocks that belong to no prompt, if the ones for probes are not leased already."""
        blocks = self.blocks_of(key)[:count]
        if any(self.held.get(block) for block in blocks):
            self.prefill(self.export.failed(key, ErrorCode.OVERLOADED, "none", self.time))
            return
        for index, block in enumerate(blocks):
            self.held[block] = 1
            self.prefill_memory[block] = (key, index)
        self.prefill(self.export.progressed(key, blocks, self.time))
        self.prefill(self.export.committed(key, 0, None, 0, self.time))

    # Decode.

    def submit_decode(self, key: Key) -> None:
        self.asked.add(key)
        self.decode(
            self.handover.submitted(
                key,
                worker_id="P",
                epoch=1,
                address="a",
                num_tokens=NUM_BLOCKS,
                deadline=100,
                now=self.decode_now,
            )
        )

    def turn_decode(self) -> None:
        self.decode_turn = self.time
        self.decode(self.handover.tick(self.decode_now))

    def decode_hears(self, link: int) -> None:
        message = self.to_decode[link].popleft()
        if isinstance(message, str):
            self.decode(self.handover.link_closed(link, "lost", self.decode_now))
        else:
            self.decode(self.handover.received(link, message, self.decode_now))

    def abort_decode(self, key: Key) -> None:
        self.aborted.add(key)
        self.decode(self.handover.aborted(key, self.decode_now))

    def reserve(self, key: Key) -> None:
        self.waiting.discard(key)
        self.reserved.add(key)
        table = tuple(self.blocks_of(key))
        cached = self.scenario.cached_blocks
        for index, block in enumerate(table):
            self.decode_memory[block] = (key, index) if index < cached else GARBAGE
        self.decode(self.handover.reserved(key, table, cached, self.decode_now))

    def land(self, index: int) -> None:
        read = self.reads[index]
        read.landed = True
        for remote, own in read.pairs:
            self.require(read.key in self.reserved, "bytes landed in a block that was given back")
            garbled = self.scenario.garbles and read.peer_id == f"P/1/{FIRST_LINK}"
            sent = self.prefill_memory.get(remote, GARBAGE)
            self.decode_memory[own] = GARBAGE if garbled else sent

    def poll(self, index: int) -> None:
        read = self.reads.pop(index)
        now = self.decode_now
        right = not read.stamped or self.decode_memory.get(read.pairs[0][1]) == (read.key, 0)
        if read.landed and right:
            if read.stamped:
                self.proven.add(read.peer_id)
            self.decode(self.handover.read_done(read.key, read.number, now))
        else:
            self.decode(self.handover.read_failed(read.key, read.number, "broken", now))

    def decode(self, actions: list[act.HandoverAction]) -> None:
        for action in actions:
            match action:
                case act.OpenLink(link, _):
                    self.to_prefill[link] = deque()
                    self.to_decode[link] = deque()
                    self.export.link_opened(link)
                case act.Send(link, message):
                    self.check_claim(link, message)
                    if link not in self.broken:
                        self.to_prefill[link].append(message)
                case act.CloseLink(link, _):
                    self.close_link(link, True)
                case act.ConnectPeer():
                    pass
                case act.DisconnectPeer(peer_id):
                    self.reads = [read for read in self.reads if read.peer_id != peer_id]
                case act.Reserve(key):
                    self.waiting.add(key)
                case act.DropBlocks(key):
                    pending = [read for read in self.reads if read.key == key]
                    self.require(not pending, "blocks dropped under a pending READ")
                    self.waiting.discard(key)
                    self.reserved.discard(key)
                case act.StartRead(key, number, peer_id, pairs, stamped):
                    self.require(key in self.reserved, "a READ without a reservation")
                    proven = not self.scenario.proves or peer_id in self.proven
                    untested = act.ProbeOutcome.REFUSED in self.probe_ends
                    may_read = proven or untested or stamped
                    self.require(may_read, "a READ over a link that nobody has tested")
                    self.reads.append(PendingRead(key, number, peer_id, pairs, stamped))
                case act.Deliver(key=key):
                    self.deliver(key)
                case act.Fail(key, _, _):
                    self.require(key in self.keys, "a probe failed a request")
                    self.end(key, "failed")
                case act.ReserveScratch(key, _):
                    self.decode(self.reserve_scratch(key))
                case act.ProbeEnded(key, outcome, _):
                    self.require(key == self.probing, "a probe ended twice, or one that is not")
                    self.probing = None
                    self.probe_ends.append(outcome)
                case act.LinkTested():
                    pass

    def reserve_scratch(self, key: Key) -> list[act.HandoverAction]:
        now = self.decode_now
        if self.scenario.decode_is_full:
            return self.handover.failed(key, ErrorCode.OVERLOADED, "none", now)
        self.reserved.add(key)
        return self.handover.reserved(key, tuple(self.blocks_of(key)), 0, now)

    def check_claim(self, link: int, message: DecodeMessage) -> None:
        if isinstance(message, Probe):
            self.require(self.probing is None, "two probes at a time")
            alone = self.asked <= self.ended.keys() | self.aborted
            a_test = self.scenario.proves and message.num_blocks == 1
            self.require(alone or a_test, "a probe beside a prompt")
            self.probing = message.key
            self.claims[message.key] = link
        elif isinstance(message, Claim):
            self.require(message.key not in self.claims, "claimed twice")
            self.claims[message.key] = link
        elif isinstance(message, Release):
            self.require(message.key in self.claims, "released without a claim")
            self.require(message.key not in self.released, "released twice")
            self.released.add(message.key)
            reading = any(read.key == message.key for read in self.reads)
            self.require(not reading, "released under a pending READ")

    def deliver(self, key: Key) -> None:
        self.end(key, "delivered")
        self.require(key in self.reserved, "delivered without blocks")
        self.reserved.discard(key)
        self.require(not any(read.key == key for read in self.reads), "delivered while reading")
        for index, block in enumerate(self.blocks_of(key)):
            right = self.decode_memory[block] == (key, index)
            self.require(right, f"delivered bytes of {self.decode_memory[block]}")

    def end(self, key: Key, how: str) -> None:
        self.require(key not in self.ended, f"{key} ended twice")
        self.require(key not in self.aborted, f"{key} ended after its abort")
        spoken = key in self.enough and self.scenario.calm
        self.require(not spoken, f"decode {how} a request that had ended well")
        self.ended[key] = how

    # Links, promises.

    def break_link(self, link: int, deliver: bool) -> None:
        if link not in self.broken:
            self.lost.add(link)
            self.close_link(link, deliver)

    def close_link(self, link: int, deliver: bool) -> None:
        if link in self.broken:
            return
        self.broken.add(link)
        for queue in (self.to_prefill[link], self.to_decode[link]):
            if not deliver:
                queue.clear()
            queue.append(CLOSED)  # type: ignore[attr-defined]

    def require(self, right: bool, what: str) -> None:
        if not right:
            raise Violation(what)
