"""One watch: events as they happen, bookmarks, and the ways in which a watch ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tests.support.kube.kinds import Kind
from tests.support.kube.request import flag
from tests.support.kube.store import Object, Store, event_of

DEFAULT_S = 300.0


class CutError(ConnectionError):
    """The server drops the connection."""


class Watch:
    """Lives as long as its request. All but `run` is for tests, on the server's event loop."""

    def __init__(
        self,
        store: Store,
        kind: Kind,
        namespace: str | None,
        wanted: Callable[[Object], bool],
        query: dict[str, str],
    ) -> None:
        self.kind = kind
        self._store = store
        self._namespace = namespace
        self._wanted = wanted
        self._query = query
        asked = query.get("resourceVersion", "")
        self._initial = asked in ("", "0") or flag(query, "sendInitialEvents")
        self._subscription = store.subscribe(store.version if self._initial else int(asked))
        self._woken = self._subscription.woken
        self._bookmark = False
        self._cut: bytes | None = None

    def bookmark(self) -> None:
        """Say how far the watch has come, if the client wants to know."""
        self._bookmark = flag(self._query, "allowWatchBookmarks")
        self._woken.set()

    def cut(self, last_words: bytes = b"") -> None:
        """Drop the connection, after some bytes that may be half a line."""
        self._cut = last_words
        self._woken.set()

    async def run(self, receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Answer the request."""
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        left = asyncio.ensure_future(receive())
        try:
            async for line in self._lines(left):
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            left.cancel()
            self._store.leave(self._subscription)

    async def _lines(self, left: "asyncio.Future[Any]") -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + float(self._query.get("timeoutSeconds", DEFAULT_S))
        if self._initial:
            version = self._store.version
            for item in self._store.find(self.kind, self._namespace):
                if self._wanted(item):
                    yield _line("ADDED", item)
            if flag(self._query, "sendInitialEvents"):
                yield self._bookmark_line(version, {"k8s.io/initial-events-end": "true"})
        while not left.done():
            self._woken.clear()
            pending, self._subscription.pending = self._subscription.pending, []
            for change in pending:
                resource, namespace, _ = change.key
                if resource == self.kind.resource and self._namespace in (None, namespace):
                    event = event_of(change, self._wanted)
                    if event is not None:
                        yield _line(*event)
            if self._bookmark:
                self._bookmark = False
                yield self._bookmark_line(self._store.version)
            if self._cut is not None:
                yield self._cut
                raise CutError
            if loop.time() >= ends_at:
                return
            waits = [left, asyncio.ensure_future(self._woken.wait())]
            await asyncio.wait(
                waits, timeout=ends_at - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
            waits[1].cancel()

    def _bookmark_line(self, version: int, annotations: dict[str, str] | None = None) -> bytes:
        metadata = {"resourceVersion": str(version), "creationTimestamp": None}
        item = {
            "kind": self.kind.kind,
            "apiVersion": self.kind.group_version,
            "metadata": {**metadata, **({"annotations": annotations} if annotations else {})},
        }
        return _line("BOOKMARK", item)


def _line(kind: str, item: object) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"
