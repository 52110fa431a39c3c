"""A streaming request that a test watches while it breaks things."""

import threading
from collections.abc import Callable
from typing import Any

import httpx

from tests.support.cluster import Cluster, Worker, stream_events
from tests.support.process import wait_until

LONG_PROMPT = "The keeper of the lighthouse wrote in her log: " * 20
LONG_TOKENS = 40


class Stream(threading.Thread):
    """A streaming request in the background, by default a long one, and what has come of it."""

    def __init__(self, system: Cluster, **body: Any) -> None:
        super().__init__(daemon=True)
        self._system = system
        self._body = body
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: dict[str, Any] | None = None
        self.start()

    def run(self) -> None:
        model = self._system.get("/v1/models").json()["data"][0]["id"]
        body = {
            "model": model,
            "prompt": LONG_PROMPT,
            "max_tokens": LONG_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            **self._body,
        }
        url = f"{self._system.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=90) as response:
            if response.status_code != 200:
                response.read()
                self.error = response.json()["error"]
                return
            for event in stream_events(response):
                if "error" in event:
                    assert self.error is None, "a request ends once"
                    self.error = event["error"]
                    continue
                choice = event["choices"][0]
                self.ids += choice.get("token_ids") or []
                self.finish = choice["finish_reason"] or self.finish

    def wait(self, timeout_s: float = 60.0) -> None:
        self.join(timeout_s)
        assert not self.is_alive(), f"no end after {timeout_s} s; log:\n{self._system.log}"

    def ends_like(self, expected: list[int]) -> bool:
        """Wait; True if the answer is whole, whatever happened meanwhile."""
        self.wait()
        assert self.error is None, self.error
        return (self.ids, self.finish) == (expected, "length")


def busy(workers: list[Worker], holds: Callable[[Any], bool]) -> Worker:
    """The worker whose load report satisfies `holds`, as soon as one does."""

    def find() -> Worker | None:
        return next((one for one in workers if one.process and holds(one.describe().load)), None)

    return wait_until(find, 30, "a worker to be busy")


def prefilling(load: Any) -> bool:
    """True while a worker has a good part of a prompt before it."""
    return load.running > 0 and load.backlog_tokens >= 64
