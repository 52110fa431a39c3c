"""One request as a client sees it: sent, its tokens noted as they come, and judged.

Used to learn what an endpoint takes and by every client process. Counts of tokens are the
endpoint's own (usage at the end of the stream); moments are those of the events with text.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

TIMEOUT = "timeout"
NO_CONNECTION = "no connection"
BROKEN = "connection broke"
CUT = "stream cut off"
SHORT = "too few tokens"
IN_STREAM = "error in the stream"
UNREADABLE = "not a stream of events"
_DETAIL = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, ready to be sent."""

    path: str
    body: bytes
    output_tokens: int | None
    """What must come for the answer to count; None: however many."""
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request. Seconds count from the moment that it was due."""

    number: int = 0
    due_s: float = 0.0
    """After the start of the run."""
    late_s: float = 0.0
    """By which it was sent after it was due, for which the client is to blame."""
    times: Sequence[float] = ()
    """Of each event with tokens."""
    ended_s: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    request_id: str = ""
    cause: str = ""
    """Why it failed, in words that are alike for like failures; empty: it did not."""
    detail: str = ""


@dataclass(slots=True)
class _Stream:
    """What has come of a stream so far; `time.monotonic` seconds."""

    times: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = ""
    done: bool = False
    cause: str = ""
    detail: str = ""

    def fail(self, cause: str, detail: object = "") -> None:
        self.cause, self.detail = cause, str(detail)[:_DETAIL]


async def ask(
    http: httpx.AsyncClient, asked: Asked, *, number: int = 0, due: float, begin: float
) -> Outcome:
    """Send one request and wait for its end, whatever that is.

    Args:
        http: its base URL is the endpoint.
        asked: what to send.
        number: of the request.
        due: when it was to be sent, on `time.monotonic`.
        begin: start of the run, on the same clock.
    """
    stream = _Stream()
    sent = time.monotonic()
    try:
        async with asyncio.timeout(asked.timeout_s):
            await _follow(http, asked, stream)
    except (TimeoutError, httpx.TimeoutException):
        stream.fail(TIMEOUT, f"after {asked.timeout_s:g} s")
    except (httpx.ConnectError, OSError) as error:
        stream.fail(NO_CONNECTION, error)
    except httpx.HTTPError as error:
        stream.fail(BROKEN, repr(error))
    ended = time.monotonic()
    output_tokens = int(stream.usage.get("completion_tokens") or len(stream.times))
    if not stream.cause:
        if not stream.done:
            stream.fail(CUT, f"after {len(stream.times)} events, without [DONE]")
        elif output_tokens < (asked.output_tokens or 1):
            stream.fail(SHORT, f"{output_tokens} of {asked.output_tokens or 1}")
    # Tokens without any text came at the latest with the end.
    times = stream.times if stream.times or stream.cause else [ended]
    return Outcome(
        number=number,
        due_s=due - begin,
        late_s=max(0.0, sent - due),
        times=[moment - due for moment in times],
        ended_s=ended - due,
        prompt_tokens=stream.usage.get("prompt_tokens"),
        cached_tokens=(stream.usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        output_tokens=output_tokens,
        request_id=stream.request_id,
        cause=stream.cause,
        detail=stream.detail,
    )


async def _follow(http: httpx.AsyncClient, asked: Asked, stream: _Stream) -> None:
    headers = {"Content-Type": "application/json"}
    async with http.stream("POST", asked.path, content=asked.body, headers=headers) as response:
        stream.request_id = response.headers.get("x-request-id", "")
        if response.status_code != httpx.codes.OK:
            stream.fail(f"HTTP {response.status_code}", reason(await response.aread()))
            return
        rest = b""
        async for piece in response.aiter_bytes():
            moment = time.monotonic()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    _event(line[5:].strip(), moment, stream)
            if stream.cause:
                return


def _event(data: bytes, moment: float, stream: _Stream) -> None:
    if data == b"[DONE]":
        stream.done = True
        return
    try:
        event = orjson.loads(data)
        if event.get("error"):
            stream.fail(IN_STREAM, reason(data))
            return
        stream.usage = event.get("usage") or stream.usage
        for choice in event.get("choices", ()):
            said = choice.get("delta") or choice
            if any(
                said.get(name) for name in ("text", "content", "reasoning_content", "reasoning")
            ):
                stream.times.append(moment)
                stream.request_id = stream.request_id or str(event.get("id", ""))
    except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
        stream.fail(UNREADABLE, error)


def reason(body: bytes) -> str:
    """What an error of OpenAI's form says, or its text."""
    try:
        said = orjson.loads(body)
        error = said.get("error", said)
        return str(error["message"] if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, AttributeError, KeyError):
        return body.decode(errors="replace").strip()[:_DETAIL] or "no reason given"
