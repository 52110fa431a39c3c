"""How long one body keeps everybody else waiting: hostile ones, and large ones of honest clients.

    python -m benchmarks.hostile_bodies

A real router with the tokenizer and chat template of the demo model, in front of a worker without
an engine, gets one body after the other. Meanwhile another connection asks for /health again and
again: the longest that it waits is how long the body held the router's event loop, if the machine
does nothing else.
"""

import argparse
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from benchmarks.router_processes import keep_a_core_free, router, workers

ROUNDS = 3
PAUSE_S = 0.001
"""Between two looks."""
AFTER_S = 0.05
"""How long others are looked at after the answer: what the body was turned into is freed then."""
DEADLINE_S = 120.0
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ALMOST = 15 << 20
"""Bytes of the largest bodies, a little below what a router takes by default."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A body, and what it is."""

    name: str
    path: str
    body: bytes


def honest() -> Iterator[Sent]:
    """Large requests that have to be served."""
    yield _chat("1 MiB of prose", _says("The quick brown fox jumps. " * 38_000))
    yield _completion("131,072 token ids", prompt=[7] * 131_072)
    yield _completion("16 prompts of 65,536 ids", prompt=[list(range(65_536))] * 16)
    yield _chat("8,192 messages", *[_says(f"message {i}") for i in range(8192)])
    parts = [{"type": "text", "text": f"part {i}"} for i in range(8192)]
    yield _chat("8,192 parts of a message", {"role": "user", "content": parts})
    yield _completion("4,096 biases", prompt="x", logit_bias={str(i): 1 for i in range(4096)})
    names = {f"p{i}": {"type": "string", "description": "what " * 40} for i in range(1000)}
    yield _completion("a schema of 240 KiB", prompt="x", json_schema={"properties": names})


def hostile() -> Iterator[Sent]:
    """Requests that are there to do harm; some that are of no use are answered all the same."""
    yield Sent("600,000 fields", CHAT, orjson.dumps({f"f{i}": i for i in range(600_000)}))
    yield _completion("800,000 biases", prompt="x", logit_bias={str(i): 1 for i in range(800_000)})
    yield _chat("a message of 900,000 fields", {f"f{i}": 1 for i in range(900_000)})
    yield _chat("240,000 template variables", _says("x"), chat_template_kwargs=_numbered(240_000))
    yield _chat("400,000 messages", *[_says("a")] * 400_000)
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": "1", "type": "function", "function": function}] * 40_000
    yield _chat("40,000 calls in a message", {"role": "assistant", "tool_calls": calls})
    yield _completion("2,400,000 ids", prompt=[1] * 2_400_000)
    yield _completion("2,400,000 ids and a string", prompt=[*[1] * 2_400_000, "x"])
    yield _completion("7,000,000 ids", prompt=[1] * 7_000_000)
    yield _completion("4,000,000 strings", prompt=["a"] * 3_900_000)
    yield _completion("2,400,000 stop ids", prompt="x", stop_token_ids=[0.5] * 2_400_000)
    yield _completion("800,000 long numbers", prompt=[0.1234567890123456] * 800_000)
    yield _raw("a number of 15 MiB", b'{"prompt":%b}', b"1")
    yield _raw("15 MiB of escapes", b'{"prompt":"%b"}', b"\\u00e9")
    yield _raw("15 MiB of quotes", b'{"prompt":"%b"}', b'\\"')
    yield _raw("15 MiB of text", b'{"prompt":"%b"}', b"lorem ipsum ")
    yield _raw("15 MiB of one word", b'{"prompt":"%b"}', b"a")
    yield _raw("a name of 15 MiB", b'{"%b":1}', b"a")
    yield _raw("15,000,000 brackets", b"%b", b"[")
    yield _raw("strings without an end", b'{"prompt":%b', b'"\\')
    yield _raw("brackets between quotes", b'{"prompt":%b', b'"[')
    parameters = {"anyOf": [{"a": {}}] * 47_000}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    yield _chat("a tool of 94,000 objects", _says("x"), tools=[tool], tool_choice="required")
    yield _completion("n of 10^9", prompt="x", n=10**9)


def _numbered(count: int) -> dict[str, int]:
    return {f"k{i}": i for i in range(count)}


def _says(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def _chat(name: str, *messages: dict[str, object], **fields: object) -> Sent:
    body = {"max_tokens": 1, "messages": messages, **fields}
    return Sent(name, CHAT, orjson.dumps(body))


def _completion(name: str, **fields: object) -> Sent:
    return Sent(name, COMPLETION, orjson.dumps({"max_tokens": 1, **fields}))


def _raw(name: str, form: bytes, repeated: bytes) -> Sent:
    return Sent(name, COMPLETION, form % (repeated * (ALMOST // len(repeated))))


class Looks:
    """Asks a router for its health until told to end."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_s = 0.0

    def __enter__(self) -> "Looks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(DEADLINE_S)
        self._connection.close()

    def _run(self) -> None:
        while not self._ended.wait(PAUSE_S):
            began = time.perf_counter()
            self._connection.request("GET", "/health")
            self._connection.getresponse().read()
            self.longest_s = max(self.longest_s, time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one body went."""

    answer: str
    took_s: float
    others_waited_s: float


def send(port: int, sent: Sent) -> Outcome:
    """Send a body and wait for its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with Looks(port) as looks:
        began = time.perf_counter()
        connection.request("POST", sent.path, sent.body, {"content-type": "application/json"})
        answer = connection.getresponse()
        body = json.loads(answer.read())
        took_s = time.perf_counter() - began
        time.sleep(AFTER_S)
    connection.close()
    message = body["error"]["message"] if "error" in body else ""
    return Outcome(f"{answer.status} {message[:80]}", took_s, looks.longest_s)


def main() -> None:
    """Print a line for each body."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bodies whose names hold this")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--model", default="demo")
    asked = parser.parse_args()
    keep_a_core_free()
    with workers("grpc") as behind, router(asked.model, behind) as server:
        for kind, bodies in (("honest", honest()), ("hostile", hostile())):
            for sent in bodies:
                if asked.only not in sent.name:
                    continue
                outcomes = [send(server.port, sent) for _ in range(asked.rounds)]
                waited_ms = min(each.others_waited_s for each in outcomes) * 1e3
                took_ms = min(each.took_s for each in outcomes) * 1e3
                print(
                    f"{kind:8} {sent.name:28} others waited {waited_ms:6.0f} ms, "
                    f"answered in {took_ms:6.0f} ms: {outcomes[0].answer}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
