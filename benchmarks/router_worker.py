"""Workers without an engine, for measuring routers: a process of their own, on free ports.

    python -m benchmarks.router_worker grpc --rate 50
    python -m benchmarks.router_worker http

`grpc` is a decode worker that speaks the worker protocol: one TokenBatch per step with a token of
every sequence, as an engine would send it. `http` is a bare ASGI app under the router's own HTTP
server that streams completions: the peer routers' worker, and the measure of what streaming costs
with nothing behind it. Each stream gives way to the others after every token, as one does whose
tokens come one by one. Both go as fast as they are read, or make `--rate` steps a second.

A token is the time when it was made: TICKS_PER_S ticks a second of the monotonic clock, modulo
TICKS, so that whoever reads the text knows how long it was under way.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson
import uvloop
from tokenizers import Tokenizer, decoders, models

from core.version import PROTOCOL
from router.http_protocol import ConnectionLimits
from router.http_server import http_server, listen
from rpc.auth import Credentials
from rpc.server import RpcServer
from rpc.token_batch import TokenRow, token_batch
from rpc.v1 import worker_pb2, worker_pb2_grpc

TICKS = 100_000
TICKS_PER_S = 100_000
MODEL = "bench"
PROMPT = "x"
"""A text of one token, the one that is no moment."""
REPORT_S = 0.25


def tick(seconds: float) -> int:
    """The token of a moment."""
    return int(seconds * TICKS_PER_S) % TICKS


def text_of(token_id: int) -> str:
    """What a token reads as; always the same number of characters."""
    return f"{token_id:05d} "


def write_model(folder: Path) -> None:
    """Write a tokenizer whose tokens read as `text_of` says."""
    # To the decoder of byte-level BPE a space is this letter.
    vocab = {text_of(index).replace(" ", "\u0120"): index for index in range(TICKS)}
    vocab[PROMPT] = TICKS
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


class Pace:
    """When the next step is due."""

    def __init__(self, rate: float, phase: float) -> None:
        self._step_s = 1 / rate if rate else 0.0
        now = time.monotonic()
        # On a grid that all share, so that workers keep out of step with each other.
        self._next = now - now % (self._step_s or 1.0) + phase * self._step_s

    async def wait(self) -> None:
        """Until the next step; at once, but after everybody else, if there is no rate."""
        if self._step_s:
            self._next = max(self._next + self._step_s, time.monotonic())
        await asyncio.sleep(max(0.0, self._next - time.monotonic()) if self._step_s else 0)


@dataclass(slots=True)
class Running:
    """One request."""

    request_id: str
    attempt: int
    index: int
    end: int


class StampingWorker(worker_pb2_grpc.WorkerServicer):
    """Gives every sequence one token per step."""

    def __init__(self, name: str, *, rate: float, phase: float, together: int) -> None:
        self._name = name
        self._rate, self._phase = rate, phase
        self._together = together

    async def Attach(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """The router's link."""
        await anext(request_iterator)
        yield worker_pb2.WorkerMessage(hello=self._description())
        sequences: dict[str, Running] = {}
        wanted = asyncio.Event()
        listening = asyncio.create_task(_listen(request_iterator, sequences, wanted))
        pace = Pace(self._rate, self._phase)
        reported_at = 0.0
        try:
            while True:
                if time.monotonic() - reported_at > REPORT_S:
                    reported_at = time.monotonic()
                    yield _load(len(sequences))
                begun = any(each.index for each in sequences.values())
                if not begun and len(sequences) < self._together:
                    wanted.clear()
                    await _within(wanted, REPORT_S)
                    continue
                await pace.wait()
                running = list(sequences.values())
                if running:
                    yield _step(running)
                for each in running:
                    if each.index == each.end:
                        sequences.pop(each.request_id, None)
                        yield _finished(each)
        finally:
            listening.cancel()

    def _description(self) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(
            worker_id=self._name,
            protocol=PROTOCOL,
            epoch=1,
            role=worker_pb2.ROLE_DECODE,
            model=MODEL,
            model_digest=b"bench",
            layout=worker_pb2.KvLayout(
                num_layers=1,
                num_kv_heads=1,
                head_dim=8,
                block_size=16,
                dtype="float32",
                block_bytes=1024,
            ),
            num_blocks=1 << 20,
            max_model_len=1 << 20,
            max_num_seqs=4096,
            vocab_size=TICKS + 1,
        )


async def _listen(
    messages: AsyncIterator[worker_pb2.RouterMessage],
    sequences: dict[str, Running],
    wanted: asyncio.Event,
) -> None:
    async for message in messages:
        match message.WhichOneof("body"):
            case "submit":
                submit = message.submit
                sequences[submit.request_id] = Running(
                    submit.request_id,
                    submit.attempt,
                    len(submit.output_ids),
                    submit.sampling.max_tokens,
                )
                wanted.set()
            case "abort":
                sequences.pop(message.abort.request_id, None)


async def _within(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


def _step(running: list[Running]) -> worker_pb2.WorkerMessage:
    token_ids = [tick(time.monotonic())]
    rows = [TokenRow(each.request_id, each.attempt, each.index, token_ids) for each in running]
    for each in running:
        each.index += 1
    return worker_pb2.WorkerMessage(tokens=token_batch(rows))


def _finished(running: Running) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(
        finished=worker_pb2.Finished(
            request_id=running.request_id,
            attempt=running.attempt,
            reason=worker_pb2.FINISH_REASON_LENGTH,
        )
    )


def _load(running: int) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(
        load=worker_pb2.LoadReport(state=worker_pb2.WORKER_STATE_READY, running=running)
    )


async def serve_grpc(workers: Sequence[StampingWorker]) -> None:
    """Print the ports and serve until killed."""
    servers, ports = [], []
    for each in workers:
        server = RpcServer(Credentials(), services=["diptych.v1.Worker"])
        worker_pb2_grpc.add_WorkerServicer_to_server(each, server.grpc_server)
        ports.append(server.bind("127.0.0.1", 0))
        await server.start()
        servers.append(server)
    print(*ports, flush=True)
    await asyncio.gather(*(server.grpc_server.wait_for_termination() for server in servers))


def bare_app(rate: float) -> Any:
    """Streams completions of `max_tokens` tokens, and answers what peers ask a worker first."""
    mark = "\x00"
    chunk = {
        "id": f"cmpl-{'0' * 32}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "text": mark, "logprobs": None, "finish_reason": None}],
    }
    head, tail = (b"data: %b\n\n" % orjson.dumps(chunk)).split(orjson.dumps(mark))
    model = {"id": MODEL, "object": "model", "owned_by": "bench", "max_model_len": 1 << 20}
    facts = {"data": [model], "object": "list", "model_path": MODEL, "is_generation": True}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] != "POST":
            kind = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            await send({"type": "http.response.body", "body": orjson.dumps(facts)})
            return
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        pace = Pace(rate, 0.0)
        for _ in range(orjson.loads(body)["max_tokens"]):
            await pace.wait()
            text = orjson.dumps(text_of(tick(time.monotonic())))
            data = b"%b%b%b" % (head, text, tail)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


async def serve_http(app: Any) -> None:
    """Print the port and serve as the router would, until killed."""
    listener = listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    await http_server(app, limits=ConnectionLimits(), shutdown_s=1).serve(sockets=[listener])


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A worker without an engine.")
    parser.add_argument("kind", choices=("grpc", "http"))
    parser.add_argument("--count", type=int, default=1, help="grpc workers, evenly out of step")
    parser.add_argument("--rate", type=float, default=0.0, help="steps a second; 0: no limit")
    parser.add_argument("--together", type=int, default=1, help="requests that begin as one batch")
    given = parser.parse_args()
    if given.kind == "grpc":
        workers = [
            StampingWorker(
                f"w{index}",
                rate=given.rate,
                phase=index / given.count,
                together=given.together,
            )
            for index in range(given.count)
        ]
        uvloop.run(serve_grpc(workers))
    else:
        uvloop.run(serve_http(bare_app(given.rate)))


if __name__ == "__main__":
    main()
