"""Frames between rank 0 and one other rank, over a socket pair that the child inherits.

The pipe is also the leash: a rank ends when rank 0's end closes, and rank 0 learns the same way
that a rank is gone.
"""

import json
import socket
import struct
import threading
from enum import IntEnum

from core.errors import DiptychError, ErrorCode

_HEADER = struct.Struct("<BI")
MAX_FRAME_BYTES = 64 << 20
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
        assert len(body) <= MAX_FRAME_BYTES, "no plan is as long"
        try:
            with self._sending:
                self._sock.sendall(_HEADER.pack(kind, len(body)) + body)
        except OSError as error:
            raise PipeClosedError(f"could not send: {error}") from error

    def receive(self) -> tuple[Frame, bytes]:
        """Wait for one frame.

        Raises:
            PipeClosedError: the other end is closed, or sends no frames of ours.
        """
        kind, length = _HEADER.unpack(self._read(_HEADER.size))
        if length > MAX_FRAME_BYTES:
            raise PipeClosedError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
        try:
            return Frame(kind), self._read(length)
        except ValueError as error:
            raise PipeClosedError(f"a frame of unknown kind {kind}") from error

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
