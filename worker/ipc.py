"""The pipe between a worker's service process and its engine process.

One Unix stream socket carries length-prefixed protobuf frames: EngineCommand one way, EngineEvent
the other. It is also the leash: the engine process ends when the socket reports that the service is
gone.
"""

import asyncio
import logging
import select
import socket
import struct
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from rpc.v1 import ipc_pb2

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20
"""Bounds a corrupt length; a snapshot of 10 million cached blocks needs 160 MB."""
_SOCKET_BUFFER_BYTES = 4 << 20
_READ_BYTES = 1 << 18


class PipeClosedError(Exception):
    """The process at the other end is gone."""


def open_pipe() -> tuple[socket.socket, socket.socket]:
    """Make the two ends: (service's, engine's)."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return ends


def _encode(message: Message) -> bytes:
    body = message.SerializeToString()
    return _HEADER.pack(len(body)) + body


def _frame_length(header: bytes) -> int:
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise PipeClosedError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return int(length)


def _decode(kind: type[M], body: bytes) -> M:
    """Both ends come from one installation: what can't be read is damage, and ends the pipe."""
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise PipeClosedError(f"a frame of {len(body)} bytes is no {kind.__name__}") from error


class CommandPipe(Protocol):
    """What the engine loop needs of its end of the pipe; see EnginePipe."""

    def receive(self, timeout_s: float) -> list[ipc_pb2.EngineCommand]:
        """Commands that have arrived."""
        ...

    def send(self, event: ipc_pb2.EngineEvent) -> None:
        """Send one event."""
        ...


class EnginePipe:
    """The engine's end: blocking, single thread."""

    def __init__(self, sock: socket.socket, *, send_timeout_s: float = 30.0) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._send_timeout_s = send_timeout_s
        self._buffer = bytearray()

    def receive(self, timeout_s: float) -> list[ipc_pb2.EngineCommand]:
        """Commands that have arrived, waiting up to `timeout_s` seconds for the first.

        Raises:
            PipeClosedError: the service process is gone.
        """
        # Not poll(), which rounds up to whole milliseconds; READs are waited for in shorter sleeps.
        if not select.select([self._sock], [], [], max(0.0, timeout_s))[0]:
            return []
        while True:
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError as error:
                raise PipeClosedError(str(error)) from error
            if not data:
                raise PipeClosedError("the service process closed the pipe")
            self._buffer += data
        return self._take_frames()

    def _take_frames(self) -> list[ipc_pb2.EngineCommand]:
        commands = []
        offset = 0
        while len(self._buffer) - offset >= _HEADER.size:
            body = offset + _HEADER.size
            end = body + _frame_length(bytes(self._buffer[offset:body]))
            if len(self._buffer) < end:
                break
            commands.append(_decode(ipc_pb2.EngineCommand, bytes(self._buffer[body:end])))
            offset = end
        del self._buffer[:offset]
        return commands

    def send(self, event: ipc_pb2.EngineEvent) -> None:
        """Send one event; blocks only if the service has not read for a whole socket buffer.

        Raises:
            PipeClosedError: the service is gone or has not read for `send_timeout_s`.
        """
        data = memoryview(_encode(event))
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                writable = select.select([], [self._sock], [], self._send_timeout_s)[1]
                if not writable:
                    raise PipeClosedError("the service process stopped reading") from None
            except ConnectionError as error:
                raise PipeClosedError(str(error)) from error

    def close(self) -> None:
        """Close this end; the other sees the end of the stream."""
        self._sock.close()


class ServicePipe:
    """The service's end: asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> "ServicePipe":
        """Wrap the service's end of `open_pipe`."""
        return cls(*await asyncio.open_unix_connection(sock=sock))

    def send(self, command: ipc_pb2.EngineCommand) -> None:
        """Queue one command; never blocks. Use `drain` where much is sent."""
        self._writer.write(_encode(command))

    async def drain(self) -> None:
        """Wait until the engine has taken enough for more to be sent."""
        await self._writer.drain()

    async def events(self) -> AsyncIterator[ipc_pb2.EngineEvent]:
        """Events in order; ends when the engine process is gone."""
        while True:
            try:
                header = await self._reader.readexactly(_HEADER.size)
                body = await self._reader.readexactly(_frame_length(header))
                event = _decode(ipc_pb2.EngineEvent, body)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            except PipeClosedError as error:
                log.error("the engine's pipe can't be used any more: %s", error)
                return
            yield event

    def close(self) -> None:
        """Close this end; the engine process ends when it sees that."""
        self._writer.close()
