"""A worker without an engine: a real gRPC server whose tokens are those of `fake_sequence.py`.

Tokens come out one per turn of `step()`, or freely when the worker is `running`; tests decide when
streams break, when the worker falls silent, what fails, and which cache events are sent. It keeps
every Submit and Abort that it was sent.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from core.version import PROTOCOL
from rpc.auth import Credentials
from rpc.server import RpcServer
from rpc.token_batch import token_batch
from rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.support.fake_sequence import EOS, VOCAB, Running, next_token

DEADLINE_S = 10.0


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until a condition holds; fails after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # any condition, not an event of ours
            await asyncio.sleep(0.002)


@dataclass(slots=True)
class FakeWorker:
    """One worker at one port. Fields are its script; change them at any time."""

    role: str
    worker_id: str
    digest: bytes = b"digest"
    epoch: int = 1
    block_size: int = 4
    max_model_len: int = 4096
    credentials: Credentials = field(default_factory=Credentials)
    """What it asks of routers, and proves itself with."""
    running: bool = True
    """False: tokens come only from `step()`."""
    reporting: bool = True
    """False: no load reports, that is silence."""
    state: int = worker_pb2.WORKER_STATE_READY
    backlog_tokens: int = 0
    """What it says that it has to compute."""
    fail: Callable[[worker_pb2.Submit], tuple[str, str] | None] = lambda _: None
    """Code and message to fail a request with at once."""
    report_first_import: bool = True
    """An importing worker repeats the first token, as the protocol allows."""
    end_with_eos_at: int | None = None
    silent_ends: bool = False
    """Never say that a request is finished."""
    snapshot_on_hello: bool = True
    protocol: int = PROTOCOL
    place: worker_pb2.Place = field(default_factory=worker_pb2.Place)
    says: Callable[[worker_pb2.Submit], Sequence[int]] | None = None
    """The whole output of a request; None: a function of the sequence."""
    prompt_steps: int = 2
    """Steps that log probabilities of a prompt take, before the one of its first token."""

    port: int = 0
    attaches: int = 0
    resyncs: int = 0
    submits: list[worker_pb2.Submit] = field(default_factory=list)
    aborts: list[worker_pb2.Abort] = field(default_factory=list)
    peers: dict[str, "FakeWorker"] = field(default_factory=dict)
    """Workers by id, for imports."""
    handed: set[tuple[str, int]] = field(default_factory=set)
    """Exports that are complete."""
    _sequences: dict[tuple[str, int], Running] = field(default_factory=dict)
    _streams: dict[int, asyncio.Queue[worker_pb2.WorkerMessage | None]] = field(
        default_factory=dict
    )
    _cache_seq: int = 0
    _server: RpcServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def attached(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    @property
    def busy(self) -> list[tuple[str, int]]:
        """Requests that it still works on."""
        return list(self._sequences)

    @property
    def sequences(self) -> list[Running]:
        """The same, with all that it knows of them."""
        return list(self._sequences.values())

    async def start(self) -> None:
        self._server = RpcServer(self.credentials, services=["diptych.v1.Worker"])
        worker_pb2_grpc.add_WorkerServicer_to_server(_Servicer(self), self._server.grpc_server)
        self.port = self._server.bind("127.0.0.1", self.port)
        await self._server.start()

    async def stop(self) -> None:
        """End as a killed process does: streams break, requests are gone."""
        assert self._server is not None
        self._sequences.clear()
        await self._server.grpc_server.stop(None)

    def break_streams(self) -> None:
        """End every Attach stream, and with it what came over it."""
        self._sequences.clear()
        for queue in self._streams.values():
            queue.put_nowait(None)

    def step(self) -> None:
        """One token for every request that can have one."""
        rows, ends = [], []
        for sequence in list(self._sequences.values()):
            if self._score(sequence):
                continue
            first_index = self._advance(sequence)
            if first_index is None:
                continue
            rows.append(sequence.row(first_index))
            end = sequence.end
            if end is not None and not self.silent_ends:
                ends.append((sequence, end))
        if rows:
            self._tell(worker_pb2.WorkerMessage(tokens=token_batch(rows)))
        for sequence, end in ends:
            self.finish(sequence.key, end)

    def _score(self, sequence: Running) -> bool:
        """Tell a part of the prompt's log probabilities, if wanted; True if that was all it did."""
        part = sequence.score(self.prompt_steps)
        if part is None:
            return False
        self._tell(worker_pb2.WorkerMessage(prompt=part))
        return self.prompt_steps > 0

    def _next(self, sequence: Running) -> int:
        if self.says is not None:
            return self.says(sequence.submit)[sequence.num_done]
        return next_token(sequence.tokens, sequence.submit.sampling.seed)

    def _advance(self, sequence: Running) -> int | None:
        """Append a token; returns the index of the first that is to be told, None if none is."""
        done = sequence.num_done
        if sequence.phase == "import" and not sequence.handed_over:
            peer = self.peers[getattr(sequence.submit, "import").prefill_worker_id]
            if sequence.key not in peer.handed:
                return None
            sequence.handed_over = True
            sequence.tokens.append(self._next(sequence))
            return done if self.report_first_import else None
        sequence.tokens.append(self._next(sequence))
        if done == self.end_with_eos_at:
            sequence.tokens[-1] = EOS
        return done

    def finish(self, key: tuple[str, int], reason: int, code: str = "", message: str = "") -> None:
        """Say the last word about a request."""
        ended = self._sequences.pop(key, None)
        matched_stop = None
        if ended is not None and reason == worker_pb2.FINISH_REASON_STOP:
            matched_stop = ended.tokens[-1] if ended.tokens[-1] != EOS else None
        if reason == worker_pb2.FINISH_REASON_HANDED_OVER:
            self.handed.add(key)
        self._tell(
            worker_pb2.WorkerMessage(
                finished=worker_pb2.Finished(
                    request_id=key[0],
                    attempt=key[1],
                    reason=reason,  # type: ignore[arg-type]
                    error_code=code,
                    error_message=message,
                    cached_tokens=1,
                    matched_stop=matched_stop,
                    kv_bytes=64,
                    times=worker_pb2.StageTimes(queue_s=1e-4, prefill_s=2e-4, transfer_s=1e-4),
                )
            )
        )

    def tell_cache(
        self, *, stored: bytes = b"", removed: bytes = b"", lose: int = 0, epoch: int | None = None
    ) -> None:
        """Send a cache event; `lose` events before it never arrive."""
        self._cache_seq += 1 + lose
        self._tell(
            worker_pb2.WorkerMessage(
                cache=worker_pb2.CacheEvents(
                    epoch=self.epoch if epoch is None else epoch,
                    seq=self._cache_seq,
                    stored=stored,
                    removed=removed,
                )
            )
        )

    def tell_load(self) -> None:
        self._tell(self._load())

    def _load(self) -> worker_pb2.WorkerMessage:
        return worker_pb2.WorkerMessage(
            load=worker_pb2.LoadReport(
                state=self.state,  # type: ignore[arg-type]
                running=len(self._sequences),
                backlog_tokens=self.backlog_tokens,
            )
        )

    def _tell(self, message: worker_pb2.WorkerMessage) -> None:
        for queue in self._streams.values():
            queue.put_nowait(message)

    def receive(self, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("body"):
            case "submit":
                submit = message.submit
                self.submits.append(submit)
                failure = self.fail(submit)
                if failure is not None:
                    self.finish(
                        (submit.request_id, submit.attempt),
                        worker_pb2.FINISH_REASON_FAILED,
                        *failure,
                    )
                    return
                sequence = Running(
                    submit, [*submit.prompt_ids, *submit.output_ids], len(submit.prompt_ids)
                )
                self._sequences[sequence.key] = sequence
            case "abort":
                self.aborts.append(message.abort)
                self._sequences.pop((message.abort.request_id, message.abort.attempt), None)
            case "resync":
                self.resyncs += 1
                self.tell_snapshot()

    def tell_snapshot(self) -> None:
        self._tell(
            worker_pb2.WorkerMessage(
                cache=worker_pb2.CacheEvents(epoch=self.epoch, seq=self._cache_seq, reset=True)
            )
        )

    async def attach(
        self, incoming: AsyncIterator[worker_pb2.RouterMessage]
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        self.attaches += 1
        hello = await anext(incoming)
        assert hello.WhichOneof("body") == "hello"
        yield worker_pb2.WorkerMessage(hello=self.description())
        stream = self.attaches
        queue: asyncio.Queue[worker_pb2.WorkerMessage | None] = asyncio.Queue()
        self._streams[stream] = queue
        if self.snapshot_on_hello:
            self.tell_snapshot()

        own: set[tuple[str, int]] = set()

        async def receive() -> None:
            async for message in incoming:
                if message.HasField("submit"):
                    own.add((message.submit.request_id, message.submit.attempt))
                self.receive(message)

        async def turn() -> None:
            while True:
                if self.running:
                    self.step()
                await asyncio.sleep(0.001)

        async def report() -> None:
            while True:
                if self.reporting:
                    self.tell_load()
                await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(each()) for each in (receive, turn, report)]
        try:
            while (message := await queue.get()) is not None:
                yield message
        finally:
            del self._streams[stream]
            for task in tasks:
                task.cancel()
            # What a later stream has brought meanwhile is its own.
            for key in own:
                self._sequences.pop(key, None)
            await asyncio.gather(*tasks, return_exceptions=True)

    def description(self) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=worker_pb2.ROLE_PREFILL if self.role == "prefill" else worker_pb2.ROLE_DECODE,
            model="fake",
            model_digest=self.digest,
            layout=worker_pb2.KvLayout(
                num_layers=1,
                num_kv_heads=1,
                head_dim=8,
                block_size=self.block_size,
                dtype="float32",
                block_bytes=256,
            ),
            num_blocks=1000,
            max_model_len=self.max_model_len,
            max_num_seqs=64,
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
            place=self.place,
            protocol=self.protocol,
            kv_address=f"127.0.0.1:{self.port}" if self.role == "prefill" else "",
        )


class _Servicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Attach(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        async for message in self._worker.attach(request_iterator):
            yield message


@asynccontextmanager
async def fake_workers(*, prefill: int = 0, decode: int = 0) -> AsyncIterator[list[FakeWorker]]:
    """Started workers, prefill first; stopped at the end."""
    counts = Counter(prefill=prefill, decode=decode)
    workers = [
        FakeWorker(role=role, worker_id=f"{role}-{index}")
        for role in ("prefill", "decode")
        for index in range(counts[role])
    ]
    by_id = {worker.worker_id: worker for worker in workers}
    for worker in workers:
        worker.peers = by_id
        await worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.stop()
