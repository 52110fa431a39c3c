"""A scripted fleet, small tokenizers and a real server for tests of the router's HTTP side."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from core.errors import DiptychError, UnavailableError
from core.finish import FinishReason
from core.tokens import PromptLogprobs, TokenLogprobs
from router.access.door import Door
from router.api.settings import ApiSettings
from router.app import create_app
from router.generation import GenerationEnd, GenerationRequest, ServedModel, Take, Token
from router.http_protocol import ConnectionLimits
from router.http_server import http_server
from router.text.loading import text_processor
from router.text.processor import TextProcessor
from router.text.vocabulary import byte_characters
from router.tls import ServerCertificate

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
WAIT_S = 10.0
"""Longest that a test waits for something that is about to happen."""


def byte_tokenizer(extra: Sequence[str] = ("hello", " world", "ab", "abc")) -> Tokenizer:
    """Byte-level BPE with three special tokens, all bytes, and whole words that merge."""
    characters = {byte: character for character, byte in byte_characters().items()}
    pieces = [*SPECIALS, *(characters[byte] for byte in range(256))]
    merges: list[tuple[str, str]] = []
    for word in extra:
        spelt = [characters[byte] for byte in word.encode()]
        grown = spelt[0]
        for character in spelt[1:]:
            if (grown, character) not in merges:
                merges.append((grown, character))
                pieces.append(grown + character)
            grown += character
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return tokenizer


def piece_tokenizer(*, strip: bool = True) -> Tokenizer:
    """Sentencepiece-like: pieces with a visible space, and byte fallback."""
    words = ["▁hello", "▁world", "▁", "hello", "!", "é", "ld", "▁▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_text() -> TextProcessor:
    """Text side over `byte_tokenizer`."""
    return text_processor(byte_tokenizer(), CHAT_TEMPLATE, {"eos_token": SPECIALS[EOS]}, {})


class Gate:
    """A step of a script at which the fleet waits until the test opens it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def open(self) -> None:
        """Let it go on."""
        self._event.set()

    async def wait(self) -> None:
        """Wait for `open`."""
        await self._event.wait()


Turn = Sequence[int] | Gate | DiptychError | Exception
"""Token ids of one turn, a wait, or a failure."""


@dataclass
class Script:
    """What the fleet does with one sequence."""

    turns: Sequence[Turn] = ()
    reason: FinishReason = FinishReason.STOP
    matched_stop: int | None = None
    cached_tokens: int = 0
    mode: str = "disaggregated"
    refuse: Exception | None = None
    """Raised when the sequence is to be placed."""


@dataclass
class ScriptedGenerator:
    """A Generator that plays scripts and notes what was asked of it."""

    script: Callable[[GenerationRequest], Script] = lambda _: Script()
    served: ServedModel | None = field(
        default_factory=lambda: ServedModel(
            name="tiny", max_model_len=512, vocab_size=300, eos_token_ids=(EOS,)
        )
    )
    ready: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    running: int = 0
    left: int = 0
    timelines: dict[str, dict[str, object]] = field(default_factory=dict)
    aborted: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def model(self) -> ServedModel:
        if self.served is None:
            raise UnavailableError("No worker has attached yet.")
        return self.served

    def abort(self, request_id: str) -> bool:
        event = self.aborted.get(request_id)
        if event is None or event.is_set():
            return False
        event.set()
        return True

    def abort_all(self) -> int:
        return sum([self.abort(request_id) for request_id in self.aborted])

    def timeline(self, request_id: str) -> dict[str, object] | None:
        return self.timelines.get(request_id)

    def explain(self, request_id: str) -> dict[str, object] | None:
        return self.timelines.get(request_id)

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator["ScriptedGeneration"]:
        self.requests.append(request)
        script = self.script(request)
        if script.refuse is not None:
            raise script.refuse
        self.running += 1
        aborted = self.aborted[request.request_id] = asyncio.Event()
        try:
            yield ScriptedGeneration(script, request, aborted)
        finally:
            del self.aborted[request.request_id]
            self.running -= 1
            self.left += 1


class NoFleet:
    """A FleetControl of one worker that has nothing cached."""

    async def flush_caches(self) -> list[dict[str, object]]:
        return [{"address": "nowhere:1", "freed_blocks": 0}]

    def describe(self) -> list[dict[str, object]]:
        return [{"address": "nowhere:1", "state": "ready"}]


@dataclass
class ScriptedView:
    """What /v1/fleet and /v1/requests show."""

    listed: list[dict[str, object]] = field(default_factory=list)

    def fleet(self) -> dict[str, object]:
        return {"object": "fleet", "workers": [], "links": []}

    def requests(self, count: int) -> list[dict[str, object]]:
        return self.listed[:count]


class ScriptedGeneration:
    """Plays one script."""

    def __init__(self, script: Script, request: GenerationRequest, aborted: asyncio.Event) -> None:
        self._script = script
        self._aborted = aborted
        self._logprobs = request.sampling.logprobs
        self._request = request
        self._began = False
        self._turns = self._play()
        self._ahead: list[Sequence[Token] | Exception] = []

    async def begun(self) -> None:
        try:
            self._ahead.append(await anext(self._turns))
        except StopAsyncIteration:
            pass
        except Exception as error:
            self._ahead.append(error)

    async def feed(self, take: Take) -> bool:
        if self._ahead:
            turn = self._ahead.pop()
            if isinstance(turn, Exception):
                raise turn
            if not take(turn):
                return True
        async for tokens in self._turns:
            if not take(tokens):
                return True
        return False

    async def _play(self) -> AsyncIterator[Sequence[Token]]:
        index = 0
        for turn in self._script.turns:
            await asyncio.sleep(0)
            if isinstance(turn, Gate):
                await self._gate(turn)
            if self._aborted.is_set():
                return
            if isinstance(turn, Gate):
                continue
            if isinstance(turn, Exception):
                raise turn
            tokens = [
                Token(index + i, token_id, self._entry(token_id)) for i, token_id in enumerate(turn)
            ]
            index += len(turn)
            self._began = True
            yield tokens

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """The token at position p has log probability -p and rank p; the likeliest are 100 on."""
        num_top, ids = self._request.sampling.prompt_logprobs, self._request.prompt_ids
        if num_top is None or not self._began or len(ids) < 2:
            return None
        positions = range(1, len(ids))
        return PromptLogprobs(
            first=1,
            logprobs=[-float(position) for position in positions],
            ranks=list(positions),
            num_top=num_top,
            top_ids=[100 + i for _ in positions for i in range(num_top)],
            top_logprobs=[-0.5 - i for _ in positions for i in range(num_top)],
        )

    @property
    def end(self) -> GenerationEnd:
        return GenerationEnd(
            finish_reason=FinishReason.ABORTED if self._aborted.is_set() else self._script.reason,
            matched_stop=self._script.matched_stop,
            cached_tokens=self._script.cached_tokens,
            mode=self._script.mode,
        )

    async def _gate(self, gate: Gate) -> None:
        waits = [asyncio.ensure_future(gate.wait()), asyncio.ensure_future(self._aborted.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _entry(self, token_id: int) -> TokenLogprobs | None:
        if self._logprobs is None:
            return None
        top = tuple((token_id + i, -0.5 - i) for i in range(self._logprobs))
        return TokenLogprobs(-0.5, top)


def says(text: str, *, turn: int = 1, **kwargs: object) -> Script:
    """A script that generates `text` and then the end of sequence."""
    ids = byte_tokenizer().encode(text).ids
    turns = [ids[i : i + turn] for i in range(0, len(ids), turn)]
    return Script(turns=[*turns, [EOS]], matched_stop=EOS, **kwargs)  # type: ignore[arg-type]


@dataclass
class Served:
    """A running router over a scripted fleet."""

    url: str
    generator: ScriptedGenerator
    registry: CollectorRegistry

    def metric(self, name: str, **labels: str) -> float:
        """Value of a sample, 0 if it was never observed."""
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def serve(
    generator: ScriptedGenerator,
    *,
    settings: ApiSettings | None = None,
    text: TextProcessor | None = None,
    observed: ScriptedView | None = None,
    door: Door | None = None,
    limits: ConnectionLimits | None = None,
    certificate: ServerCertificate | None = None,
) -> AsyncIterator[Served]:
    """Run the router's app under uvicorn on loopback."""
    registry = CollectorRegistry()
    app = create_app(
        generator=generator,
        fleet=NoFleet(),
        facts={"model": "tiny"},
        text=text or byte_text(),
        settings=settings or ApiSettings(),
        observed=observed or ScriptedView(),
        registry=registry,
        door=door,
    )
    async with listening(app, limits=limits, certificate=certificate) as port:
        url = f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
        yield Served(url, generator, registry)


@asynccontextmanager
async def listening(
    app: object,
    *,
    limits: ConnectionLimits | None = None,
    certificate: ServerCertificate | None = None,
) -> AsyncIterator[int]:
    """Run an ASGI application under the router's server; its port on loopback."""
    with closing_socket() as listener:
        server = http_server(
            app, limits=limits or ConnectionLimits(), certificate=certificate, shutdown_s=0
        )
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await running


@contextlib.contextmanager
def closing_socket() -> Iterator[socket.socket]:
    """A listening socket on a free loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is true; fail if it takes longer than WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - any state, most of it has no event
            await asyncio.sleep(0.002)


def client(served: Served) -> httpx.AsyncClient:
    """A raw HTTP client."""
    return httpx.AsyncClient(base_url=served.url, timeout=WAIT_S, trust_env=False)


@asynccontextmanager
async def raw_connection(
    served: Served,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP connection to the server; leaving drops it."""
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
