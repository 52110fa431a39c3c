"""What the router's HTTP side costs per streamed token, beside a bare ASGI app.

Two servers in turn, each one uvicorn process (uvloop, httptools): the router's app over a generator
that has its tokens ready, and an app that does nothing but send the same bytes in the same pieces.
A client process opens STREAMS streams at once and reads them to their end. Per server it prints
tokens per second of wall time and per second of the server's own CPU time; the latter and the ratio
of the two servers hold on a machine that is busy with other things too.

    python -m benchmarks.router_stream --streams 64 --tokens 2000 --repeats 5
"""

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.synchronize
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models

from core.finish import FinishReason
from router.api.settings import ApiSettings
from router.app import create_app
from router.generation import GenerationEnd, GenerationRequest, ServedModel, Token
from router.text.loading import text_processor

WORD = "word"
DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured."""

    streams: int
    tokens: int
    repeats: int
    output: Path | None


class ReadyGenerator:
    """Has all tokens, and yields to the event loop before each, as a worker's link would."""

    ready = True
    model = ServedModel(name="bench", max_model_len=1 << 20, vocab_size=2, eos_token_ids=())

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator["ReadyGeneration"]:
        """Run one sequence."""
        yield ReadyGeneration(request.sampling.max_tokens)

    def timeline(self, request_id: str) -> dict[str, object] | None:
        """None is kept."""
        return None

    def abort(self, request_id: str) -> bool:
        """Nothing is aborted here."""
        return False

    def abort_all(self) -> int:
        """Nothing is aborted here."""
        return 0

    async def flush_caches(self) -> list[dict[str, object]]:
        """There is no worker."""
        return []

    def describe(self) -> list[dict[str, object]]:
        """There is no worker."""
        return []

    def fleet(self) -> dict[str, object]:
        """There is none."""
        return {}

    def requests(self, count: int) -> list[dict[str, object]]:
        """None is kept."""
        return []

    def explain(self, request_id: str) -> dict[str, object] | None:
        """None is kept."""
        return None


class ReadyGeneration:
    """One sequence."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self.end = GenerationEnd(finish_reason=FinishReason.LENGTH)

    async def __aiter__(self) -> AsyncIterator[Sequence[Token]]:
        """One token per turn."""
        for index in range(self._num_tokens):
            await asyncio.sleep(0)
            yield [Token(index, 0)]


def router_app() -> Any:
    """The router's app over a ReadyGenerator."""
    tokenizer = Tokenizer(models.WordLevel({WORD: 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<unk>")])
    generator = ReadyGenerator()
    return create_app(
        generator=generator,
        fleet=generator,
        facts={},
        text=text_processor(tokenizer, None, {}, {}),
        settings=ApiSettings(),
        observed=generator,
        registry=CollectorRegistry(),
    )


def bare_app() -> Any:
    """An app that sends what the router's would, without knowing why."""
    chunk = {
        "id": f"cmpl-{'0' * 32}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": "bench",
        "choices": [{"index": 0, "text": WORD, "logprobs": None, "finish_reason": None}],
    }
    event = b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(json.loads(body)["max_tokens"]):
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


def _serve(
    make_app: Callable[[], Any],
    listener: socket.socket,
    stop: multiprocessing.synchronize.Event,
) -> None:
    import uvicorn

    config = uvicorn.Config(
        make_app(), loop="uvloop", http="httptools", log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.to_thread(stop.wait)
        server.should_exit = True
        await serving

    import uvloop

    uvloop.run(run())


async def _stream(port: int, tokens: int) -> None:
    body = json.dumps({"prompt": [0], "max_tokens": tokens, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    received = 0
    tail = b""
    while data := await reader.read(1 << 18):
        received += (tail + data).count(WORD.encode())
        tail = data[-len(WORD) + 1 :]
    writer.close()
    await writer.wait_closed()
    if received != tokens:
        raise RuntimeError(f"a stream had {received} tokens instead of {tokens}")


async def _round(port: int, settings: Settings) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(_stream(port, settings.tokens) for _ in range(settings.streams)))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(make_app: Callable[[], Any], settings: Settings) -> dict[str, list[float]]:
    """Stream from one server, once to warm up and then `repeats` times.

    Returns:
        Tokens per second of wall time and of the server's CPU time, one value per repeat.
    """
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    process = spawn.Process(target=_serve, args=(make_app, listener, stop), daemon=True)
    process.start()
    listener.close()
    assert process.pid is not None
    total = settings.streams * settings.tokens
    samples: dict[str, list[float]] = {"wall": [], "cpu": []}
    try:
        asyncio.run(_round(port, settings))
        for _ in range(settings.repeats):
            cpu, wall = _cpu_seconds(process.pid), time.perf_counter()
            asyncio.run(_round(port, settings))
            samples["wall"].append(total / (time.perf_counter() - wall))
            samples["cpu"].append(total / max(_cpu_seconds(process.pid) - cpu, 1e-9))
    finally:
        stop.set()
        process.join(10)
        process.kill()
    return samples


def main() -> None:
    """Measure both servers and print the ratio."""
    parser = argparse.ArgumentParser(description="Cost of the router's HTTP side per token.")
    parser.add_argument("--streams", type=int, default=64, help="streams at once")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens per stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the samples")
    settings = Settings(**vars(parser.parse_args()))
    results = {"router": measure(router_app, settings), "bare": measure(bare_app, settings)}
    for name, samples in results.items():
        wall, cpu = (statistics.median(samples[key]) for key in ("wall", "cpu"))
        print(f"{name:7} {wall:9.0f} tokens/s   {cpu:9.0f} tokens per CPU second")
    for key in ("wall", "cpu"):
        router, bare = (statistics.median(results[name][key]) for name in ("router", "bare"))
        print(f"router / bare ({key}): {router / bare:.2f}")
    if settings.output is not None:
        document = {"settings": {**vars_of(settings), "output": None}, "results": results}
        settings.output.write_text(json.dumps(document, indent=2) + "\n")


def vars_of(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    return {
        "streams": settings.streams,
        "tokens": settings.tokens,
        "repeats": settings.repeats,
    }


if __name__ == "__main__":
    main()
