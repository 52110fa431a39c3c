"""`diptych bench` against endpoints that misbehave: each failure is told by its cause."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diptych.bench.main import main

KEY = "the-key-nobody-may-see"


class Endpoint(ThreadingHTTPServer):
    """Answers as vLLM does, except that measured requests go wrong in turn."""

    daemon_threads = True
    misdeeds: tuple[str, ...] = ()
    api_key: str | None = None
    takes_ids = True
    takes_ignore_eos = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.bodies: list[dict[str, Any]] = []
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def misdeed(self, body: dict[str, Any]) -> str:
        """That of a request; those that only probe or warm up ask for fewer tokens."""
        with self.lock:
            self.bodies.append(body)
            measured = [each for each in self.bodies if each["max_tokens"] > 8]
        if body["max_tokens"] <= 8 or not self.misdeeds:
            return ""
        return self.misdeeds[(len(measured) - 1) % len(self.misdeeds)]


class Answer(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        found = {
            "/v1/models": {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]},
            "/version": {"version": "9.9"},
        }.get(self.path)
        if self._allowed():
            self._json(404 if found is None else 200, found or {"error": {"message": "no"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._allowed():
            return
        if self.path == "/tokenize" and self.server.takes_ids:
            self._json(200, {"tokens": list(range(5, 300))})
        elif self.path not in ("/v1/completions", "/v1/chat/completions"):
            self._json(404, {"error": {"message": "no"}})
        elif "ignore_eos" in body and not self.server.takes_ignore_eos:
            self._json(400, {"error": {"message": "unknown field ignore_eos"}})
        else:
            self._complete(body, self.server.misdeed(body))

    def _complete(self, body: dict[str, Any], misdeed: str) -> None:
        if misdeed == "500":
            self._json(500, {"error": {"message": "it burns"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        count = body["max_tokens"] - (misdeed == "short")
        for index in range(count):
            if index == 2 and misdeed == "error":
                self._event({"error": {"message": "a worker was lost"}})
            if index == 2 and misdeed == "cut":
                return
            if index == 2 and misdeed == "slow":
                self.server.released.wait(30)
            text = {"delta": {"content": "a"}} if "messages" in body else {"text": "a"}
            self._event({"id": "x", "choices": [{"index": 0, **text}]})
        said = body.get("prompt", "") or body.get("messages", [{}])[0].get("content", "")
        length = 7 + 2 * len(said.split()) if isinstance(said, str) else len(said)
        usage = {"prompt_tokens": length, "completion_tokens": count}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _allowed(self) -> bool:
        wanted = self.server.api_key
        if wanted is None or self.headers.get("authorization") == f"Bearer {wanted}":
            return True
        self._json(401, {"error": {"message": "who are you"}})
        return False

    def _json(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[str]:
    thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint.url
    finally:
        endpoint.released.set()
        endpoint.shutdown()
        thread.join(10)
        endpoint.server_close()


def test_each_way_to_fail_is_told_by_its_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = Endpoint()
    endpoint.misdeeds = ("", "500", "cut", "slow", "short", "error")
    kept = tmp_path / "run.json"
    argv = ["--requests=12", "--rate=inf", "--output-tokens=9", "--prompt-tokens=20..30"]
    argv += ["--timeout-s=1500ms", "--clients=2", "--timelines=2", f"--json={kept}"]
    with serving(endpoint) as url:
        assert main(["--url", url, *argv, "--strict"]) == 1
    causes = {
        "HTTP 500": "it burns",
        "stream cut off": "after 2 events",
        "timeout": "after 1.5 s",
        "too few tokens": "8 of 9",
        "error in the stream": "a worker was lost",
    }
    shown = capsys.readouterr().out
    for cause, example in causes.items():
        assert cause in shown and example in shown
    assert "m at http" in shown and "vllm 9.9" in shown
    assert "only a Diptych router" in shown
    found = json.loads(kept.read_text())
    assert found["figures"]["causes"] == dict.fromkeys(causes, 2)
    assert found["figures"]["output_tokens"] == 18
    assert len(found["requests"]) == 12
    good = [each for each in found["requests"] if not each["cause"]]
    assert [len(each["times"]) for each in good] == [9, 9]
    measured = [body["prompt"] for body in endpoint.bodies if body["max_tokens"] == 9]
    assert all(20 <= len(prompt) <= 30 and min(prompt) >= 5 for prompt in measured)


def test_a_key_is_asked_for_and_shown_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint()
    endpoint.api_key = KEY
    with serving(endpoint) as url:
        argv = ["--url", url, "--requests=2", "--output-tokens=9", "--clients=1", "--json=-"]
        assert main(argv) == 1
        assert "give --api-key" in capsys.readouterr().err
        monkeypatch.setenv("DIPTYCH_BENCH_API_KEY", KEY)
        assert main(argv) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["figures"]["failed"] == 0
        assert "TTFT" in printed.err
        assert KEY not in printed.out + printed.err
        monkeypatch.setenv("DIPTYCH_BENCH_API_KEY", f"{KEY}\nx")
        assert main(argv) == 2
        assert KEY not in capsys.readouterr().err


def test_an_endpoint_without_token_ids_gets_words_of_the_right_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = Endpoint()
    endpoint.takes_ids = endpoint.takes_ignore_eos = False
    kept = tmp_path / "run.json"
    argv = ["--requests=3", "--concurrency=2", "--output-tokens=9", "--prompt-tokens=107"]
    with serving(endpoint) as url:
        assert main(["--url", url, *argv, "--chat", "--clients=1", f"--json={kept}"]) == 0
    shown = capsys.readouterr().out
    assert "does not take ignore_eos" in shown and "Prompts are text" in shown
    found = json.loads(kept.read_text())
    assert [each["prompt_tokens"] for each in found["requests"]] == [107, 107, 107]


def test_a_closed_loop_goes_on_until_its_time_is_over(tmp_path: Path) -> None:
    kept = tmp_path / "run.json"
    argv = ["--duration=400ms", "--concurrency=3", "--clients=2", "--output-tokens=9"]
    with serving(Endpoint()) as url:
        assert main(["--url", url, *argv, f"--json={kept}"]) == 0
    requests = json.loads(kept.read_text())["requests"]
    assert len(requests) > 3
    assert len({each["number"] for each in requests}) == len(requests)
    assert max(each["due_s"] for each in requests) < 0.4
    moments = [(each["due_s"], 1) for each in requests]
    moments += [(each["due_s"] + each["ended_s"], -1) for each in requests]
    under_way = 0
    for _, change in sorted(moments):
        under_way += change
        assert under_way <= 3


def test_a_place_that_cannot_be_written_is_told_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--json=/nowhere/run.json"]) == 2
    assert "--json /nowhere/run.json" in capsys.readouterr().err


def test_nobody_there_is_an_error_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9"]) == 1
    assert "--url" in capsys.readouterr().err
