"""Engine loops without processes: fake executors, pipes of lists, links that a test can cut."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from core.kv_layout import KvLayout
from core.sampling import SamplingParams
from decode.importer import Importer
from decode.metrics import ImportMetrics
from engine.engine import Engine
from engine.grammar.compiler import GrammarCompiler
from engine.metrics import EngineMetrics
from kvtransfer.faulty import FaultyTransport
from kvtransfer.handover_config import HandoverConfig
from kvtransfer.messages import Hello
from kvtransfer.rank_transport import RankTransport
from kvtransfer.transport import BlockPieces, ReadState
from kvtransfer.worker_transport import WorkerTransport
from prefill.exporter import Exporter
from prefill.metrics import ExportMetrics
from router.fleet.wire import sampling_to_proto
from rpc.token_batch import token_rows
from rpc.v1 import ipc_pb2, worker_pb2
from telemetry.faults import Faults, Point, parse_faults
from tests.support.engine import FakeClock, WatchedEngine, make_config
from tests.support.fake_executor import DIGEST, FakeExecutor, FakePool
from worker.faulty import FaultyExecutor, FaultyPipe
from worker.loop import EngineLoop
from worker.role import Outbox, Role

BLOCK_SIZE = 4
LEASE_TTL_S = 15.0
LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=1, block_size=BLOCK_SIZE, dtype="float32", block_bytes=8
)
ROUTER = 1
COPY_S = 0.001
"""Said to be the time of every READ."""


class ListPipe:
    """The engine's end of a pipe whose other end is the test."""

    def __init__(self) -> None:
        self.inbox: deque[ipc_pb2.EngineCommand] = deque()
        self.sent: list[ipc_pb2.EngineEvent] = []
        self.last_timeout_s = 0.0

    def receive(self, timeout_s: float) -> list[ipc_pb2.EngineCommand]:
        self.last_timeout_s = timeout_s
        commands = list(self.inbox)
        self.inbox.clear()
        return commands

    def send(self, event: ipc_pb2.EngineEvent) -> None:
        self.sent.append(event)


@dataclass
class CopyRead:
    """A READ that is done after some polls; the bytes move at the end, as late as they may."""

    copy: Callable[[], None]
    polls_left: int
    cut: bool = False
    error: str = ""
    duration_s: float = 0.0

    def poll(self) -> ReadState:
        if self.cut:
            self.error = "disconnected"
            return ReadState.FAILED
        if self.polls_left:
            self.polls_left -= 1
            return ReadState.PENDING
        self.copy()
        self.duration_s = COPY_S
        return ReadState.DONE


@dataclass
class CopyTransport:
    """Copies blocks between the pools of this process."""

    pool: FakePool
    pools: dict[bytes, FakePool]
    read_polls: int = 1
    name: str = "copy"
    reads: dict[str, list[CopyRead]] = field(default_factory=dict)
    _peers: dict[str, FakePool] = field(default_factory=dict)

    def metadata(self) -> bytes:
        key = str(id(self.pool)).encode()
        self.pools[key] = self.pool
        return key

    def connect(self, peer_id: str, metadata: bytes, pieces: BlockPieces | None = None) -> None:
        assert pieces is None, "it copies whole blocks"
        self._peers[peer_id] = self.pools[metadata]

    def read(self, peer_id: str, pairs: Sequence[tuple[int, int]]) -> CopyRead:
        source = self._peers[peer_id]

        def copy() -> None:
            for remote, local in pairs:
                self.pool.blocks[local][:] = source.blocks[remote]

        read = CopyRead(copy, self.read_polls)
        self.reads.setdefault(peer_id, []).append(read)
        return read

    def disconnect(self, peer_id: str) -> None:
        for read in self.reads.pop(peer_id, []):
            read.cut = True

    def close(self) -> None:
        for peer_id in list(self.reads):
            self.disconnect(peer_id)


@dataclass
class FakeStamps:
    """Implements Stamps in blocks of numbers."""

    pool: FakePool

    def write(self, block_id: int, name: str) -> None:
        self.pool.blocks[block_id][:] = self._stamp(name)

    def holds(self, block_id: int, name: str) -> bool:
        return self.pool.blocks[block_id] == self._stamp(name)

    def _stamp(self, name: str) -> list[int]:
        return [*name.encode()][-self.pool.block_size :]


@dataclass
class Side:
    """One worker's engine loop and what a test looks at."""

    loop: EngineLoop
    pipe: ListPipe
    engine: Engine
    executor: FakeExecutor
    role: Role
    registry: CollectorRegistry

    @property
    def balanced(self) -> bool:
        """Nothing held, nothing waiting, nothing leased."""
        self.engine.check_integrity()
        stats = self.engine.stats()
        return not (stats.held_blocks or stats.waiting or stats.running or self.role.leases)

    def tokens(self, request_id: str = "r") -> list[int]:
        """What the router was told, each index once."""
        known: dict[int, int] = {}
        for event in self.pipe.sent:
            for name, _, first, token_ids, *_ in token_rows(event.worker.message.tokens):
                if name == request_id:
                    for index, token in enumerate(token_ids, first):
                        assert known.setdefault(index, token) == token
        assert sorted(known) == list(range(len(known)))
        return [known[index] for index in range(len(known))]

    def finished(self, request_id: str = "r") -> list[worker_pb2.Finished]:
        """Every last word on a request; there must be one at most."""
        ends = [
            event.worker.message.finished
            for event in self.pipe.sent
            if event.worker.message.HasField("finished")
        ]
        return [end for end in ends if end.request_id == request_id]

    def router(self, **message: object) -> None:
        """Send something as the router."""
        frame = ipc_pb2.RouterFrame(
            channel=ROUTER,
            message=worker_pb2.RouterMessage(**message),  # type: ignore[arg-type]
        )
        self.pipe.inbox.append(ipc_pb2.EngineCommand(router=frame))


def make_side(
    role: str,
    *,
    clock: FakeClock,
    pools: dict[bytes, FakePool],
    num_blocks: int,
    overlaps: bool = False,
    probe_blocks: int = 0,
    test_links: bool = False,
    grammars: GrammarCompiler | None = None,
    num_host_blocks: int = 0,
    faults: str = "",
    **config: object,
) -> Side:
    """A worker of that role; `faults` is the text of its setting."""
    armed = Faults(parse_faults(faults), role)
    executor = FakeExecutor(
        num_blocks, BLOCK_SIZE, overlaps=overlaps, num_host_blocks=num_host_blocks
    )
    metrics_registry = CollectorRegistry()
    metrics = EngineMetrics(metrics_registry)
    # A watched engine looks into its executor, so it can have no other around it.
    failing = armed.has(Point.ENGINE_STEP)
    engine = (Engine if failing else WatchedEngine)(
        make_config(**config),
        FaultyExecutor(executor, armed) if failing else executor,
        model_digest=DIGEST,
        clock=clock,
        grammars=grammars,
    )
    copies, stamps = CopyTransport(executor.pool, pools), FakeStamps(executor.pool)
    transport: WorkerTransport = RankTransport(copies, LAYOUT, stamps)
    if armed:
        transport = FaultyTransport(transport, executor.pool, armed, clock)
    pipe = ListPipe()
    built: list[Role] = []
    hello = Hello(
        worker_id=role,
        epoch=7,
        model_digest=DIGEST,
        layout=LAYOUT,
        num_blocks=num_blocks,
        transport=transport.name,
        rank_metadata=transport.rank_metadata,
        lease_ttl_s=LEASE_TTL_S if role == "prefill" else 0.0,
        could_use_nixl=True,
    )

    def build(outbox: Outbox) -> Role:
        if role == "prefill":
            built.append(
                Exporter(
                    engine=engine,
                    outbox=outbox,
                    hello=hello,
                    transport=transport,
                    metrics=ExportMetrics(metrics_registry),
                    clock=clock,
                )
            )
        else:
            built.append(
                Importer(
                    engine=engine,
                    outbox=outbox,
                    hello=hello,
                    config=HandoverConfig(probe_blocks=probe_blocks, test_links=test_links),
                    transport=transport,
                    metrics=ImportMetrics(metrics_registry, transport.name),
                    clock=clock,
                )
            )
        return built[0]

    description = worker_pb2.WorkerDescription(
        worker_id=role,
        epoch=7,
        model_digest=DIGEST,
        vocab_size=97,
        layout=worker_pb2.KvLayout(block_size=BLOCK_SIZE),
    )
    loop = EngineLoop(
        engine=engine,
        build_role=build,
        pipe=FaultyPipe(pipe, armed) if armed else pipe,
        description=description,
        heartbeat_interval_s=0.1,
        clock=clock,
        metrics=metrics,
        registry=metrics_registry,
    )
    return Side(loop, pipe, engine, executor, built[0], metrics_registry)


class Pair:
    """A prefill and a decode loop, joined by a link that delivers everything once a turn."""

    def __init__(self, *, num_blocks: int = 16, **config: object) -> None:
        self.clock = FakeClock()
        pools: dict[bytes, FakePool] = {}
        self.prefill = make_side(
            "prefill", clock=self.clock, pools=pools, num_blocks=num_blocks, **config
        )
        self.decode = make_side(
            "decode", clock=self.clock, pools=pools, num_blocks=num_blocks, **config
        )
        self.links: set[int] = set()
        self._relayed = {id(self.prefill): 0, id(self.decode): 0}

    def turn(self) -> None:
        """One turn of both loops, and of the link between them."""
        for side in (self.prefill, self.decode):
            side.loop.turn()
        self.relay()
        self.clock.now += 0.01

    def relay(self) -> None:
        """Carry what the engines sent since the last time."""
        for side, other in ((self.decode, self.prefill), (self.prefill, self.decode)):
            start = self._relayed[id(side)]
            self._relayed[id(side)] = len(side.pipe.sent)
            for event in side.pipe.sent[start:]:
                self._relay_one(event, other)

    def _relay_one(self, event: ipc_pb2.EngineEvent, other: Side) -> None:
        match event.WhichOneof("body"):
            case "open":
                self.links.add(event.open.channel)
            case "decode" if event.decode.channel in self.links:
                other.pipe.inbox.append(ipc_pb2.EngineCommand(decode=event.decode))
            case "prefill" if event.prefill.channel in self.links:
                other.pipe.inbox.append(ipc_pb2.EngineCommand(prefill=event.prefill))
            case "close":
                self.cut()

    def cut(self) -> None:
        """End every link."""
        for link in sorted(self.links):
            for side in (self.prefill, self.decode):
                closed = ipc_pb2.ChannelClosed(channel=link, reason="cut")
                side.pipe.inbox.append(ipc_pb2.EngineCommand(closed=closed))
        self.links.clear()

    def submit(
        self, prompt: Sequence[int], *, attempt: int = 1, request_id: str = "r", **sampling: object
    ) -> SamplingParams:
        """Place a request on the pair, as a router does."""
        ignore_eos = "structured" not in sampling
        params = SamplingParams(**{"max_tokens": 6, "ignore_eos": ignore_eos, **sampling})
        for side, phase in ((self.prefill, "export"), (self.decode, "import")):
            submit = worker_pb2.Submit(
                request_id=request_id,
                attempt=attempt,
                prompt_ids=prompt,
                sampling=sampling_to_proto(params),
                deadline_ms=60_000,
                block_hashes=b"".join(_hashes(prompt)),
            )
            if phase == "export":
                submit.export.decode_worker_id = "decode"
            else:
                source = getattr(submit, "import")
                source.prefill_worker_id, source.prefill_epoch = "prefill", 7
                source.kv_address = "prefill:1"
            side.router(submit=submit)
        return params

    def abort(self, *, attempt: int = 1, request_id: str = "r") -> None:
        """Take a request back from both."""
        for side in (self.prefill, self.decode):
            side.router(abort=worker_pb2.Abort(request_id=request_id, attempt=attempt))

    def run(self, turns: int = 200) -> None:
        """Turn until decode has said its last word, or fail."""
        for _ in range(turns):
            self.turn()
            if self.decode.finished():
                return
        raise AssertionError(f"no end after {turns} turns")

    def settle(self, turns: int = 20) -> None:
        """A few turns more, for what follows an end."""
        for _ in range(turns):
            self.turn()


def _hashes(prompt: Sequence[int]) -> list[bytes]:
    from core.block_hash import hash_blocks, root_hash

    return hash_blocks(prompt, BLOCK_SIZE, root_hash(DIGEST))
