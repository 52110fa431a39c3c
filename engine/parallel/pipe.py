"""Frames between rank 0 and the others, over stream sockets that it is given.

A rank on rank 0's host has a pipe of its own, which is also its leash: it ends when rank 0's end
closes, and rank 0 learns the same way that a rank is gone. The ranks of another host share one:
what goes down is for all of them, and what comes up says by which rank it was sent. How bytes get
there and back is the business of whoever brought the socket.
"""

import json
import socket
import struct
import threading
from enum import IntEnum
from typing import NamedTuple

from core.errors import DiptychError, ErrorCode

_HEADER = struct.Struct("<BHI")
"""Kind, rank that sends it, bytes that follow."""
HEADER_BYTES = _HEADER.size
MAX_FRAME_BYTES = 32 << 20
"""Bounds a corrupt length. A plan of a million tokens in new sequences needs 8 MB."""
_SOCKET_BUFFER_BYTES = 1 << 20
_MAX_MESSAGE_CHARS = 4000


class Frame(IntEnum):
    """What a frame holds."""

    START = 1
    """To a rank: what it is to build."""
    PLAN = 2
    """To a rank: the next step."""
    CLOSE = 3
    """To a rank: free the device and end."""
    READY = 4
    """To rank 0: this rank can take steps."""
    FAILED = 5
    """To rank 0: the rank ends for this reason."""
    SIDE = 6
    """Either way: of what shares the pipe with the engine; see side.py."""
    COPY = 7
    """To a rank: copy blocks between its pool and its host memory; see host_memory.py."""
    COPIED = 8
    """To a rank: a copy has ended on rank 0, and has to have ended there before what follows."""
    LOST = 9
    """To rank 0: the ranks of this pipe are gone, with a text that says why."""


class Received(NamedTuple):
    """A frame that came."""

    kind: Frame
    body: bytes
    rank: int
    """Who sent it."""


def frame(kind: Frame, body: bytes = b"", rank: int = 0) -> bytes:
    """A frame as it travels."""
    assert len(body) <= MAX_FRAME_BYTES, "no plan is as long"
    return _HEADER.pack(kind, rank, len(body)) + body


def read_header(header: bytes) -> tuple[Frame, int, int]:
    """Kind, rank and number of bytes that follow.

    Raises:
        PipeClosedError: this is no header of ours.
    """
    kind, rank, length = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise PipeClosedError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    try:
        return Frame(kind), rank, length
    except ValueError as error:
        raise PipeClosedError(f"a frame of unknown kind {kind}") from error


def failure_to(error: Exception) -> bytes:
    """Body of a FAILED frame."""
    known = isinstance(error, DiptychError)
    code = error.code if isinstance(error, DiptychError) else ErrorCode.INTERNAL
    message = str(error) if known else f"{type(error).__name__}: {error}"
    return json.dumps([code, message[:_MAX_MESSAGE_CHARS]]).encode()


def failure_from(body: bytes) -> tuple[ErrorCode, str]:
    """Code and message of a FAILED frame."""
    try:
        code, message = json.loads(body)
        return ErrorCode(code), str(message)
    except (TypeError, ValueError):
        return ErrorCode.INTERNAL, "it did not say why"


class PipeClosedError(Exception):
    """The process at the other end is gone, or does not read."""


class RankPipe:
    """One end. Any thread sends, one receives."""

    def __init__(self, sock: socket.socket, timeout_s: float | None = None) -> None:
        """Args: timeout_s is how long one send or receive may wait; None: for ever."""
        self.rank = 0
        """Of this end; what is sent bears it."""
        self._sock = sock
        self._sending = threading.Lock()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        sock.settimeout(timeout_s)

    def fileno(self) -> int:
        """Descriptor to wait for frames on."""
        return self._sock.fileno()

    def send(self, kind: Frame, body: bytes = b"") -> None:
        """Send one frame.

        Raises:
            PipeClosedError: nobody takes it.
        """
        try:
            with self._sending:
                self._sock.sendall(frame(kind, body, self.rank))
        except OSError as error:
            raise PipeClosedError(f"could not send: {error}") from error

    def receive(self) -> Received:
        """Wait for one frame.

        Raises:
            PipeClosedError: the other end is closed, or sends no frames of ours.
        """
        kind, rank, length = read_header(self._read(HEADER_BYTES))
        return Received(kind, self._read(length), rank)

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._sock.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                count = self._sock.recv_into(view)
            except OSError as error:
                raise PipeClosedError(f"could not receive: {error}") from error
            if not count:
                raise PipeClosedError("the other process closed the pipe")
            view = view[count:]
        return bytes(data)
