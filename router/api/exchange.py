"""One HTTP request and its answer, on plain ASGI.

router/app.py makes an Exchange per request; endpoints read the body from it and write to it.
Invariant: the client's disconnect ends the work done for it at once, whatever that work waits for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from core.errors import ErrorCode
from router.access.allowance import Allowance
from router.access.caller import ANYONE, Caller
from router.api.errors import ClientDisconnectedError, Headers, HttpError
from router.api.identity import RequestIdentity

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
SendNow = Callable[[bytes], bool]

JSON = b"application/json"


@dataclass(slots=True)
class Exchange:
    """A request being answered."""

    identity: RequestIdentity
    received_at: float
    """On the router's monotonic clock."""
    headers: dict[bytes, bytes]
    path_params: dict[str, Any]
    receive: Receive
    send: Send
    send_now: SendNow
    """Sends a part of the body, if that takes no waiting; False if it sent nothing."""
    caller: Caller = ANYONE
    """Whose it is; known once the door has let it in."""
    allowance: Allowance | None = None
    """What the caller may still do, if that is limited and this counts."""
    query: bytes = b""
    """What follows the question mark of the URL."""
    body_bytes: int = 0
    """Size of the request's body, once it is read."""
    started: bool = False
    """True once the answer's status line is out."""
    phase: str = field(default="body")
    """How far it got, for the metric of disconnects: body, waiting or streaming."""

    @property
    def request_id(self) -> str:
        """x-request-id of the request and its answer."""
        return self.identity.request_id

    @property
    def log_fields(self) -> dict[str, str]:
        """What log lines about it carry."""
        trace = self.identity.trace
        traced = {"trace_id": trace.trace_id} if trace is not None else {}
        return {"request_id": self.request_id, **traced}

    async def start(self, status: int, content_type: bytes, headers: Headers) -> None:
        """Send status and headers."""
        self.started = True
        message_headers = [
            (b"content-type", content_type),
            (b"x-request-id", self.request_id.encode("ascii")),
            *headers,
            *(self.allowance.headers() if self.allowance is not None else ()),
        ]
        await self.send(
            {"type": "http.response.start", "status": status, "headers": message_headers}
        )

    async def answer(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: bytes = JSON,
        headers: Headers | None = None,
    ) -> None:
        """Send a whole answer."""
        length = (b"content-length", b"%d" % len(body))
        await self.start(status, content_type, [length, *(headers or [])])
        await self.send({"type": "http.response.body", "body": body})

    async def read_json_body(self, *, limit_bytes: int, timeout_s: float) -> bytes:
        """Read the whole body of a request that must be JSON.

        Raises:
            HttpError: 415 for another media type, 413 above the limit, 408 when it takes too long.
            ClientDisconnectedError: the client left meanwhile.
        """
        _check_media_type(self.headers)
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnectedError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit_bytes:
                        raise _too_large(limit_bytes)
                    if not message.get("more_body", False):
                        self.body_bytes = size
                        return b"".join(chunks)
        except TimeoutError:
            raise HttpError(
                408,
                ErrorCode.DEADLINE,
                f"The request's body did not arrive within {timeout_s:g} s.",
                headers=[(b"connection", b"close")],
            ) from None

    async def run(
        self,
        work: Coroutine[Any, Any, None],
        *,
        idle: Callable[[], Awaitable[float]] | None = None,
        idle_s: float | None = None,
    ) -> None:
        """Run `work` to its end, or cancel it when the client leaves. Call it after the body.

        Args:
            work: what answers the request.
            idle: called while the work goes on; returns the seconds until the next call.
            idle_s: seconds until the first call.

        Raises:
            ClientDisconnectedError: the client left first; the work has ended by then.
        """
        answering = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._disconnected())
        try:
            while True:
                await asyncio.wait(
                    {answering, leaving},
                    timeout=idle_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if answering.done():
                    return answering.result()
                if leaving.done():
                    raise ClientDisconnectedError
                if idle is not None:
                    idle_s = await idle()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            # An error's traceback has this frame, and the task the error: with the task here, only
            # the garbage collector would free them, and the body that was refused.
            del answering, leaving

    async def _disconnected(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


class Endpoint(Protocol):
    """Answers one kind of request."""

    async def __call__(self, exchange: Exchange) -> None:
        """Answer, or raise what router/app.py turns into an error answer."""
        ...


def _too_large(limit_bytes: int) -> HttpError:
    # The connection stays open: closing it on unread data would take the answer down with it. The
    # server discards what still arrives.
    return HttpError(
        413,
        "request_too_large",
        f"The request's body is larger than the {limit_bytes} bytes that this router takes.",
    )


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    media = headers.get(b"content-type", JSON).decode("latin-1").lower()
    kind, *parameters = (part.strip() for part in media.split(";"))
    charset = [part for part in parameters if part.startswith("charset=")]
    wrong_charset = charset and charset[0].removeprefix("charset=").strip('"') != "utf-8"
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if kind != "application/json" or wrong_charset or encoding != b"identity":
        raise HttpError(
            415,
            "unsupported_media_type",
            "Send the body as content-type application/json, in UTF-8 and uncompressed; "
            f"got {media!r}, content-encoding {encoding.decode('latin-1')!r}.",
        )
