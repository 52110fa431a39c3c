"""The chat as a process, against a small endpoint that answers as an OpenAI server does."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from diptych.chat.client import ChatClient
from diptych.chat.main import ChatSettings, Conversation
from router.access.door import Door
from router.tls import server_certificate
from tests.support.api_keys import KeyRing
from tests.support.pki import issue
from tests.support.process import free_port
from tests.support.router_api import ScriptedGenerator, says, serve


class Endpoint(ThreadingHTTPServer):
    """Repeats the last message in pieces; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.respond(200, json.dumps({"data": [{"id": "tiny"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append(dict(self.headers))
        text = body["messages"][-1]["content"]
        if text == "refuse":
            error = {"error": {"message": "too long by far"}}
            self.respond(400, json.dumps(error).encode(), "application/json")
            return
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in ("you said ", text)]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        if text == "fail":
            lines.append(f"data: {json.dumps({'error': {'message': 'worker lost'}})}\n\n")
        elif text != "break off":
            lines.append("data: [DONE]\n\n")
        self.respond(200, "".join(lines).encode(), "text/event-stream")

    def respond(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat(url: str, text: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "diptych", "chat", "--url", url, *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)


def test_piped_lines_are_answered_in_turn_and_remembered(endpoint: Endpoint) -> None:
    done = chat(endpoint.url, "one\n\ntwo\n/clear\nthree\n/exit\nfour\n", "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "you said one\nyou said two\nyou said three\n"
    contents = [[m["content"] for m in body["messages"]] for body in endpoint.asked]
    assert contents == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "you said one", "two"],
        ["Be brief.", "three"],
    ]


def test_settings_reach_the_request(endpoint: Endpoint) -> None:
    chat(endpoint.url + "/v1", "x", "--temperature=0", "--max-tokens=7", "--api-key=k")
    (body,) = endpoint.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 7)
    assert body["stream"] is True
    assert "seed" not in body
    assert endpoint.headers[0]["Authorization"] == "Bearer k"


def test_nothing_listening_says_how_to_start_it() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = chat(url, "hello\n")
    assert done.returncode == 1
    assert url in done.stderr
    assert "diptych serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_url_is_told_apart_from_silence() -> None:
    with ChatClient("localhost:8000", timeout_s=1) as client, pytest.raises(ConfigError) as caught:
        client.model_name()
    assert "localhost:8000 is no address" in str(caught.value)
    assert "http://" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("refuse", "400: too long by far"),
        ("fail", "worker lost"),
        ("break off", "broke off before its end"),
    ],
)
def test_failed_answer_is_told_and_not_remembered(
    endpoint: Endpoint, line: str, message: str
) -> None:
    done = chat(endpoint.url, f"{line}\nnext\n")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout.endswith("you said next\n")
    assert [m["content"] for m in endpoint.asked[-1]["messages"]] == ["next"]


def test_unknown_command_is_not_sent(endpoint: Endpoint) -> None:
    done = chat(endpoint.url, "/help\n")
    assert "/clear" in done.stderr
    assert endpoint.asked == []


def test_interrupt_stops_the_answer_and_keeps_what_was_shown() -> None:
    closed: list[bool] = []

    class Client:
        def answer(self, *_: object) -> Iterator[str]:
            try:
                yield "half "
                raise KeyboardInterrupt
            finally:
                closed.append(True)

    conversation = Conversation(ChatSettings(), Client(), "tiny")  # type: ignore[arg-type]
    shown: list[str] = []
    conversation.ask("hello", shown.append)
    assert shown == ["half ", " (stopped)"]
    assert conversation.messages[-1] == {"role": "assistant", "content": "half "}
    assert closed == [True]


async def test_an_endpoint_with_keys_and_a_certificate_of_its_own(tmp_path: Path) -> None:
    files, ring = issue(tmp_path / "tls"), KeyRing(me={})
    certificate = server_certificate(str(files.cert), str(files.key))
    generator = ScriptedGenerator(lambda _: says("good day"))
    async with serve(generator, door=Door(ring.keys), certificate=certificate) as served:

        async def ask(*options: str, **env: str) -> tuple[int | None, str, str]:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "diptych", "chat", "--url", served.url),
                *("--max-tokens=9", *options),
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            async with asyncio.timeout(30):
                out, error = await process.communicate(b"hello\n")
            return process.returncode, out.decode(), error.decode()

        ca = ("--ca", str(files.ca))
        key = {"DIPTYCH_CHAT_API_KEY": ring.plain["me"]}
        assert await ask(*ca, **key) == (0, "good day\n", "")
        code, _, error = await ask(*ca)
        assert code == 1 and "401" in error
        code, _, error = await ask(**key)
        assert code == 1 and "--ca" in error
        code, _, error = await ask("--ca", str(tmp_path / "no"))
        assert code == 2 and "can't be used" in error
