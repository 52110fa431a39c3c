"""One Attach stream to one worker, opened again whenever it ends.

Owned by Fleet, which runs it as a task. A session is one stream: hello, then messages both ways.
It ends when the worker ends it, breaks the protocol, says nothing for too long, reports that its
engine stands still, or takes nothing off its queue. Ending the stream makes the worker abort all
that came over it, so the listener is told `lost` exactly once per `attached`.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast

import grpc

from router.fleet.discovery import Member
from router.fleet.wire import (
    ProtocolViolation,
    cache_from_proto,
    info_from_proto,
    leg_end_from_proto,
    load_from_proto,
    prompt_run_from_proto,
    token_runs_from_proto,
)
from router.fleet.worker import (
    CacheChange,
    LegEnd,
    PromptRun,
    TokenRun,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)
from rpc.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

CLOSED = "the router closed the link"
UNLISTED = "it is listed no longer"
BACKOFF_FIRST_S = 0.1
RESYNC_INTERVAL_S = 0.5
"""Shortest time between two requests for a snapshot: one in flight answers many gaps."""


class Stream(Protocol):
    """What a session needs of an Attach stream; see grpc.aio.StreamStreamCall."""

    async def read(self) -> object:
        """The next message, or grpc.aio.EOF. Raises InvalidStateError as `write` does."""

    async def write(self, request: worker_pb2.RouterMessage) -> None:
        """Send a message. Raises asyncio.InvalidStateError once the stream is over."""


def attach(channel: grpc.aio.Channel) -> Stream:
    """Open an Attach stream."""
    # The stub is typed for synchronous channels.
    return cast(Stream, worker_pb2_grpc.WorkerStub(channel).Attach())


class LinkListener(Protocol):
    """Who hears what workers say. Called on the event loop; must not block or raise."""

    def attached(self, worker: str, info: WorkerInfo) -> None:
        """A session began."""

    def lost(self, worker: str, cause: str) -> None:
        """It ended; the worker aborts what it was sent."""

    def tokens(self, worker: str, runs: list[TokenRun]) -> None:
        """One engine step's tokens."""

    def prompt(self, worker: str, run: PromptRun) -> None:
        """What one engine step computed of a prompt whose log probabilities are wanted."""

    def finished(self, worker: str, end: LegEnd) -> None:
        """A worker is done with its part of a request."""

    def load(self, worker: str, load: WorkerLoad) -> None:
        """A load report."""

    def cache(self, worker: str, change: CacheChange) -> bool:
        """A cache event; False if a snapshot is needed."""

    def works(self, worker: str) -> bool:
        """True while the worker owes an answer to something that it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Limits of a link; see RouterSettings for what they mean."""

    router_id: str
    version: str
    connect_timeout_s: float
    silence_s: float
    reconnect_max_s: float
    queue_size: int
    admin_timeout_s: float = 30.0
    """Time that a worker has to answer a call besides the link, such as to flush its cache."""


class _SessionEnded(Exception):
    """Why a session ended, in words for logs and clients."""


class WorkerLink:
    """The link to the worker at one address. Owned by one event loop."""

    def __init__(
        self,
        address: str,
        member: Member,
        open_channel: Callable[[str], grpc.aio.Channel],
        listener: LinkListener,
        settings: LinkSettings,
        attach: Callable[[grpc.aio.Channel], Stream] = attach,
    ) -> None:
        self.address = address
        self.member = member
        """As it is listed, or was until it was listed no longer."""
        self.listed = True
        self.info: WorkerInfo | None = None
        """Of the current session; None while there is none."""
        self.state = WorkerState.LOST
        self.load = WorkerLoad()
        """The latest report as routing sees it, perhaps of a session that is over."""
        self._said = WorkerLoad()
        """The same as the worker sent it."""
        self.cause = "not reached yet"
        """Why it is lost."""
        self._open_channel = open_channel
        self._attach = attach
        self._listener = listener
        self._settings = settings
        self._queue: asyncio.Queue[worker_pb2.RouterMessage] | None = None
        self._full = asyncio.Event()
        self._heard_at = 0.0
        self._resync_wanted = False
        self._resync_after = 0.0

    async def run(self) -> None:
        """Keep a session open until cancelled, or until the last one of a worker not listed."""
        backoff = BACKOFF_FIRST_S
        task = asyncio.current_task()
        while True:
            if await self._attend():
                backoff = BACKOFF_FIRST_S
            if task is not None and task.cancelling():
                # A task group that ends by itself swallows a cancellation that comes meanwhile.
                # Source: python/cpython issue 116720.
                raise asyncio.CancelledError
            if not self.listed:
                return
            # Jitter, so that routers do not come back all at once.
            await asyncio.sleep(random.uniform(backoff / 2, backoff))
            backoff = min(backoff * 2, self._settings.reconnect_max_s)

    def relist(self, member: Member | None) -> None:
        """Take what is listed of the worker now; None: nothing any more.

        A worker that is draining, or not listed, gets nothing new and keeps its session for as
        long as it owes an answer.
        """
        self.listed = member is not None
        self.member = member or self.member
        if self.info is not None:
            shown = self._shown(self._said)
            if shown.state is not self.state:
                self.state, self.load = shown.state, shown
                self._listener.load(self.address, shown)

    def send(self, message: worker_pb2.RouterMessage) -> bool:
        """Queue a message without waiting; False if it can't reach the worker.

        A full queue ends the session: the worker takes nothing any more.
        """
        if self._queue is None:
            return False
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._full.set()
            return False
        return True

    async def _attend(self) -> bool:
        """Run one session to its end; True if the worker had attached."""
        cause = CLOSED
        channel = self._open_channel(self.address)
        try:
            await self._session(channel)
        except* _SessionEnded as ended:
            cause = _first_cause(ended)
        except* grpc.aio.AioRpcError as failed:
            cause = _first_cause(failed)
        except* Exception:
            log.exception("the link to worker %s failed", self.address)
            cause = "the router failed to understand it"
        finally:
            attached = self._leave(cause)
            await channel.close(None)
        return attached

    def _leave(self, cause: str) -> bool:
        attached = self.info is not None
        self.info = None
        self.state = WorkerState.LOST
        known = self.cause == cause
        self.cause = cause
        self._queue = None
        if attached:
            level = logging.INFO if cause in (CLOSED, UNLISTED) else logging.WARNING
            log.log(level, "lost worker %s: %s", self.address, cause)
            self._listener.lost(self.address, cause)
        else:
            level = logging.DEBUG if known or cause in (CLOSED, UNLISTED) else logging.INFO
            log.log(level, "worker %s is not reached: %s", self.address, cause)
        return attached

    async def _session(self, channel: grpc.aio.Channel) -> None:
        stream = self._attach(channel)
        early: list[worker_pb2.WorkerMessage] = []
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                hello = worker_pb2.RouterHello(
                    router_id=self._settings.router_id, version=self._settings.version
                )
                await stream.write(worker_pb2.RouterMessage(hello=hello))
                first = await _read(stream)
                if first.WhichOneof("body") != "hello":
                    raise _SessionEnded("its first message is no hello")
                info = info_from_proto(first.hello)
                # A worker is taken in once a load report says that its engine turns.
                while (message := await _read(stream)).WhichOneof("body") != "load":
                    early.append(message)
        except TimeoutError:
            raise _SessionEnded(
                f"did not answer within {self._settings.connect_timeout_s:g} s"
            ) from None
        except (ProtocolViolation, asyncio.InvalidStateError) as error:
            raise _SessionEnded(str(error) or "the stream broke") from error

        load = self._checked(load_from_proto(message.load))
        loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue(self._settings.queue_size)
        self._full.clear()
        self._heard_at = loop.time()
        self._resync_wanted = False
        self._resync_after = self._heard_at + RESYNC_INTERVAL_S
        place = info.place.filled(self.member.place)
        self.info = info = replace(info, place=place)
        log.info("attached to %s worker %s at %s", info.role, info.worker_id, self.address)
        self._listener.attached(self.address, info)
        self._listener.load(self.address, load)
        async with asyncio.TaskGroup() as session:
            session.create_task(self._write(stream, self._queue))
            session.create_task(self._watch())
            for message in early:
                self._take(message)
            while True:
                message = await _read(stream)
                self._heard_at = loop.time()
                self._take(message)

    async def _write(self, stream: Stream, queue: asyncio.Queue[worker_pb2.RouterMessage]) -> None:
        while True:
            message = await queue.get()
            try:
                await stream.write(message)
            except asyncio.InvalidStateError as error:
                raise _SessionEnded(str(error) or "the stream broke") from error

    async def _watch(self) -> None:
        """Look after the session: silence, a full queue, a snapshot that is still missing."""
        silence_s = self._settings.silence_s
        tick_s = min(0.25, silence_s / 8)
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                async with asyncio.timeout(tick_s):
                    await self._full.wait()
                raise _SessionEnded(f"left {self._settings.queue_size} messages unread")
            except TimeoutError:
                pass
            self._resync()
            if not self.listed and not self._listener.works(self.address):
                raise _SessionEnded(UNLISTED)
            now = loop.time()
            if now - began > 4 * tick_s:
                # This process stood still itself; what the worker said meanwhile is yet unread.
                self._heard_at = now
            if now - self._heard_at > silence_s:
                raise _SessionEnded(f"said nothing for {silence_s:g} s")

    def _take(self, message: worker_pb2.WorkerMessage) -> None:
        try:
            match message.WhichOneof("body"):
                case "tokens":
                    self._listener.tokens(self.address, token_runs_from_proto(message.tokens))
                case "prompt":
                    self._listener.prompt(self.address, prompt_run_from_proto(message.prompt))
                case "finished":
                    self._listener.finished(self.address, leg_end_from_proto(message.finished))
                case "load":
                    load = self._checked(load_from_proto(message.load))
                    self._listener.load(self.address, load)
                case "cache":
                    change = cache_from_proto(message.cache)
                    self._resync_wanted = not self._listener.cache(self.address, change)
                    self._resync()
                case body:
                    raise _SessionEnded(f"sent an unexpected {body or 'empty'} message")
        except ProtocolViolation as error:
            raise _SessionEnded(str(error)) from error

    def _checked(self, load: WorkerLoad) -> WorkerLoad:
        if load.state is WorkerState.STALLED:
            raise _SessionEnded(f"its engine stands still since {load.heartbeat_age_s:.1f} s")
        self._said = load
        self.load = load = self._shown(load)
        self.state = load.state
        return load

    def _shown(self, said: WorkerLoad) -> WorkerLoad:
        """A report as routing is to see it: who is to end takes nothing new, whatever it says."""
        if self.listed and not self.member.draining:
            return said
        return replace(said, state=WorkerState.DRAINING)

    def _resync(self) -> None:
        """Ask for a snapshot if one is needed and none can be on its way."""
        now = asyncio.get_running_loop().time()
        if self._resync_wanted and now >= self._resync_after:
            self._resync_after = now + RESYNC_INTERVAL_S
            self.send(worker_pb2.RouterMessage(resync=worker_pb2.Resync()))


async def _read(stream: Stream) -> worker_pb2.WorkerMessage:
    try:
        message = await stream.read()
    except asyncio.InvalidStateError as error:
        raise _SessionEnded(str(error) or "the stream broke") from error
    if not isinstance(message, worker_pb2.WorkerMessage):
        raise _SessionEnded("it closed the stream")
    return message


def _first_cause(group: BaseExceptionGroup[Exception]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details() or 'no details'}".rstrip(".")
    return str(error).rstrip(".")
