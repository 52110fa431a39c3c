"""What a connection may take: its head, its time, its number, its certificate."""

import asyncio
import logging
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from core.errors import ConfigError
from router.http_protocol import ConnectionLimits, send_now
from router.tls import server_certificate
from tests.support.pki import issue
from tests.support.router_api import (
    Gate,
    Script,
    ScriptedGenerator,
    Served,
    byte_tokenizer,
    client,
    listening,
    raw_connection,
    says,
    serve,
)

LIMITS = ConnectionLimits(
    max_connections=4,
    head_timeout_s=0.1,
    head_bytes=2000,
    max_headers=20,
    linger_s=0.1,
    flush_s=0.1,
)
BODY = b'{"prompt": "x"}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve(ScriptedGenerator(lambda _: says("ok")), limits=LIMITS) as running:
        yield running


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Status and error code of an answer that ends the connection."""
    async with asyncio.timeout(5):
        whole = await reader.read(-1)
    head, _, body = whole.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"content-type: application/json" in head
    return int(head.split(b" ")[1]), orjson.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 3000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Endless: " + b"a" * 3000,
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 30 + b"\r\n",
    ],
    ids=["long", "endless", "url", "many"],
)
async def test_heads_that_are_too_large(served: Served, head: bytes) -> None:
    async with raw_connection(served) as (reader, writer):
        writer.write(head)
        assert await _answer(reader) == (431, "request_headers_too_large")


async def test_what_is_no_http(served: Served) -> None:
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ):
        async with raw_connection(served) as (reader, writer):
            writer.write(nonsense)
            assert await _answer(reader) == (400, "invalid_request")


async def test_a_head_that_trickles_in(served: Served) -> None:
    async with raw_connection(served) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-")
        assert await _answer(reader) == (408, "deadline_exceeded")


async def test_a_connection_that_says_nothing_is_closed(served: Served) -> None:
    async with raw_connection(served) as (reader, _), asyncio.timeout(5):
        assert await reader.read(-1) == b""


async def test_the_time_of_a_head_is_not_that_of_the_answer(served: Served) -> None:
    """Whoever was answered may take longer between requests; so may an answer itself."""
    gate = Gate()
    served.generator.script = lambda _: Script(turns=[[100], gate, [101]])
    asyncio.get_running_loop().call_later(LIMITS.head_timeout_s * 3, gate.open)
    async with raw_connection(served) as (reader, writer), asyncio.timeout(10):
        for _ in range(2):
            writer.write(REQUEST + b"\r\n")  # old clients end bodies so
            assert b" 200 " in await reader.readline()
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)


async def test_a_body_that_nobody_reads_has_to_end_soon(served: Served) -> None:
    async with raw_connection(served) as (reader, writer), asyncio.timeout(5):
        writer.write(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert b" 404 " in await reader.readline()
        while await reader.read(100):
            writer.write(b" ")


@pytest.mark.parametrize("last", [True, False])
async def test_an_answer_that_nobody_takes_is_dropped(served: Served, last: bool) -> None:
    """Whether the connection was to be closed behind it, or kept open for another request."""
    world = b"%d" % byte_tokenizer().encode(" world").ids[0]
    body = b'{"tokens":[%b]}' % b",".join([world] * 1_000_000)  # more than sockets hold
    async with raw_connection(served) as (_, writer), asyncio.timeout(30):
        writer.write(
            b"POST /detokenize HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b"
            % (b"Connection: close\r\n" if last else b"", len(body), body)
        )
        with pytest.raises(ConnectionError):
            while True:
                await writer.drain()
                await asyncio.sleep(0.02)
                writer.write(b"\r\n")


async def test_requests_one_behind_the_other_are_all_answered(served: Served) -> None:
    async with raw_connection(served) as (reader, writer), asyncio.timeout(5):
        writer.write(REQUEST * 3)
        seen = b""
        while seen.count(b"HTTP/1.1 200") < 3 or not seen.endswith(b"}"):
            seen += await reader.read(4096)


async def test_more_connections_than_there_may_be(served: Served) -> None:
    @asynccontextmanager
    async def busy() -> AsyncIterator[None]:
        async with raw_connection(served) as (reader, writer):
            writer.write(REQUEST[:-1])
            yield
            writer.write(REQUEST[-1:])
            async with asyncio.timeout(5):
                assert b" 200 " in await reader.readline()

    async with busy(), busy(), busy(), busy(), raw_connection(served) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await _answer(reader) == (503, "unavailable")
    async with client(served) as http:
        assert (await http.get("/health")).status_code == 200


async def test_certificates_are_taken_anew_when_they_are_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = issue(tmp_path / "old"), issue(tmp_path / "new")
    used = issue(tmp_path / "used")

    def put(name: str, source: Path) -> None:
        shutil.copy(source, tmp_path / name)
        (tmp_path / name).replace(tmp_path / "used" / name)

    for source in (old.cert, old.key):
        put(source.name, source)
    certificate = server_certificate(str(used.cert), str(used.key))
    assert certificate is not None
    async with serve(ScriptedGenerator(), certificate=certificate) as served:

        async def trusts(ca: Path) -> bool:
            context = ssl.create_default_context(cafile=str(ca))
            async with httpx.AsyncClient(verify=context, trust_env=False) as http:
                try:
                    return (await http.get(f"{served.url}/health")).status_code == 200
                except httpx.ConnectError as error:
                    assert "CERTIFICATE_VERIFY_FAILED" in str(error)
                    return False

        assert served.url.startswith("https")
        assert await trusts(old.ca) and not await trusts(new.ca)
        put("tls.crt", new.cert)  # the key of which comes a moment later
        with caplog.at_level(logging.ERROR):
            certificate.follow()
        assert "stays in use" in caplog.text
        assert await trusts(old.ca)
        put("tls.key", new.key)
        certificate.follow()
        assert await trusts(new.ca) and not await trusts(old.ca)


def test_certificates_that_can_t_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    files, other = issue(tmp_path / "a"), issue(tmp_path / "b")
    with pytest.raises(ConfigError, match="go together"):
        server_certificate(str(files.cert), None)
    for cert, key in (
        (files.cert, other.key),
        (files.cert, files.ca),
        (tmp_path / "no", files.key),
    ):
        with pytest.raises(ConfigError, match="can't be used"):
            server_certificate(str(cert), str(key))
    assert server_certificate(None, "") is None


async def test_a_body_is_sent_at_once_as_long_as_it_is_taken() -> None:
    part, sent, blocked, goes_on = b"x" * 4096, [b""], asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        now = send_now(scope["extensions"])
        assert not now(part), "the head comes first"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while now(part):
            sent.append(part)
        blocked.set()
        await goes_on.wait()
        await send({"type": "http.response.body", "body": b"y", "more_body": True})
        assert now(b"z"), "it is taken again"
        await send({"type": "http.response.body", "body": b""})
        assert not now(part), "the answer is over"

    async with listening(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(10):
            await blocked.wait()
            goes_on.set()
            head, _, framed = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
    assert b"transfer-encoding: chunked" in head
    body = b"".join(sent) + b"yz"
    assert b"".join(piece for piece in framed.split(b"\r\n")[1::2]) == body


async def test_only_this_server_sends_at_once() -> None:
    assert not send_now(None)(b"x")
