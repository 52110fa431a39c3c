"""What travels on a TCP transport connection: the handshake, requests and replies.

Used by both ends, `tcp.py` (who reads) and `tcp_server.py` (who is read). Invariant: no length that
came off the wire is trusted before it was compared with a bound.

A connection, all integers little-endian:
    server  CHALLENGE   magic, 32 random bytes
    client  PROOF       32 random bytes, HMAC-SHA256(token + pool nonce, "client", both randoms)
    server  WELCOME     HMAC-SHA256(token + pool nonce, "server", both randoms)
    client  RUNS        number of runs, then that many (offset, bytes) of every block
    client  REQUEST     number of blocks, then that many block ids          } any number of times
    server  REPLY       length of an error text; 0: the blocks' runs follow  }
The token never travels, and a proof is worth nothing on another connection or for another pool. The
bytes of the blocks are not encrypted, as with RDMA: the pod network must keep strangers out.
"""

import hashlib
import hmac
import ipaddress
import secrets
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from core.errors import TransferError

MAGIC = b"DIPTYCH2"
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
MAX_BLOCKS_PER_READ = 1 << 16
MAX_RUNS = 1 << 16
MAX_ERROR_BYTES = 4096
_COUNT = struct.Struct("<I")
_RUN = struct.Struct("<QQ")
_METADATA = struct.Struct(f"<8s{NONCE_BYTES}sHIQ")
_MAX_BUFFERS_PER_CALL = 512
"""Below IOV_MAX, 1024 on Linux."""
_KEEPALIVE_IDLE_S = 30
_KEEPALIVE_PROBES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpMetadata:
    """Where a pool is served, which lifetime of it, and its size."""

    host: str
    """An IP address: resolving a name could block."""
    port: int
    pool_nonce: bytes
    num_blocks: int
    block_bytes: int

    def pack(self) -> bytes:
        """For the hello."""
        fields = (MAGIC, self.pool_nonce, self.port, self.num_blocks, self.block_bytes)
        return _METADATA.pack(*fields) + self.host.encode()

    @classmethod
    def unpack(cls, data: bytes) -> "TcpMetadata":
        """What `pack` made.

        Raises:
            TransferError: it was made by something else.
        """
        try:
            magic, nonce, port, num_blocks, block_bytes = _METADATA.unpack_from(data)
            host = str(ipaddress.ip_address(data[_METADATA.size :].decode("ascii")))
        except (struct.error, ValueError) as error:
            raise TransferError(f"Not the metadata of a TCP transport: {error}.") from error
        if magic != MAGIC or not (port and num_blocks and block_bytes):
            raise TransferError("Not the metadata of a TCP transport that this version knows.")
        return cls(
            host=host,
            port=port,
            pool_nonce=nonce,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
        )


def tune(sock: socket.socket) -> None:
    """No delay for small frames, and an end to connections whose host vanished.

    Buffer sizes stay with the kernel, which was as fast and adapts to the path.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def send_buffers(sock: socket.socket, buffers: Iterable[memoryview | bytes]) -> None:
    """Send everything. Each call waits at most the socket's timeout for the peer to make room."""
    coming = filter(len, buffers)
    while waiting := [memoryview(buffer) for buffer in islice(coming, _MAX_BUFFERS_PER_CALL)]:
        first = 0
        while first < len(waiting):
            first = _advance(waiting, first, sock.sendmsg(waiting[first:]))


def receive_buffers(sock: socket.socket, buffers: Iterable[memoryview]) -> None:
    """Fill everything. Each call waits at most the socket's timeout for the next bytes.

    Raises:
        ConnectionError: the peer closed before that.
    """
    coming = filter(len, buffers)
    while waiting := list(islice(coming, _MAX_BUFFERS_PER_CALL)):
        first = 0
        while first < len(waiting):
            received = sock.recvmsg_into(waiting[first:])[0]
            if received == 0:
                raise ConnectionError("the peer closed the connection")
            first = _advance(waiting, first, received)


def _advance(waiting: list[memoryview], first: int, num_bytes: int) -> int:
    while num_bytes:
        buffer = waiting[first]
        if num_bytes < len(buffer):
            waiting[first] = buffer[num_bytes:]
            return first
        num_bytes -= len(buffer)
        first += 1
    return first


def receive_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """The next `num_bytes` bytes, a number that the caller has bounded."""
    data = bytearray(num_bytes)
    receive_buffers(sock, [memoryview(data)])
    return bytes(data)


def _proof(key: bytes, side: bytes, challenge: bytes, answer: bytes) -> bytes:
    return hmac.digest(key, side + challenge + answer, "sha256")


def greet_as_server(sock: socket.socket, token: bytes, pool_nonce: bytes) -> None:
    """Let a client prove that it knows the token and was given this pool's metadata.

    Raises:
        TransferError: it does not.
    """
    challenge = secrets.token_bytes(NONCE_BYTES)
    send_buffers(sock, [MAGIC, challenge])
    reply = receive_exactly(sock, NONCE_BYTES + PROOF_BYTES)
    answer, proof = reply[:NONCE_BYTES], reply[NONCE_BYTES:]
    key = token + pool_nonce
    if not hmac.compare_digest(proof, _proof(key, b"client", challenge, answer)):
        raise TransferError(
            "A KV reader gave a wrong proof: its token or this pool's nonce differ."
        )
    send_buffers(sock, [_proof(key, b"server", challenge, answer)])


def greet_as_client(sock: socket.socket, token: bytes, pool_nonce: bytes) -> None:
    """Prove to a server that we may read, and let it prove that it is the one.

    Raises:
        TransferError: it is something else.
    """
    hello = receive_exactly(sock, len(MAGIC) + NONCE_BYTES)
    magic, challenge = hello[: len(MAGIC)], hello[len(MAGIC) :]
    if magic != MAGIC:
        raise TransferError("What listens there is no KV transport of this version.")
    answer = secrets.token_bytes(NONCE_BYTES)
    key = token + pool_nonce
    send_buffers(sock, [answer, _proof(key, b"client", challenge, answer)])
    try:
        welcome = receive_exactly(sock, PROOF_BYTES)
    except ConnectionError as error:
        raise TransferError(
            "The peer refused us: give both workers the same token; or it has started anew."
        ) from error
    if not hmac.compare_digest(welcome, _proof(key, b"server", challenge, answer)):
        raise TransferError("What listens there does not know the token.")


def send_runs(sock: socket.socket, runs: Sequence[tuple[int, int]]) -> None:
    """Say which (offset, bytes) of every block will be asked for."""
    send_buffers(sock, [_COUNT.pack(len(runs)), *(_RUN.pack(*run) for run in runs)])


def receive_runs(sock: socket.socket, block_bytes: int) -> list[tuple[int, int]]:
    """What `send_runs` said.

    Raises:
        TransferError: a run lies outside a block, or they are more than a block holds.
    """
    (count,) = _COUNT.unpack(receive_exactly(sock, _COUNT.size))
    if not 0 < count <= MAX_RUNS:
        raise TransferError(f"{count} runs of each block were asked for, allowed are {MAX_RUNS}.")
    runs = list(_RUN.iter_unpack(receive_exactly(sock, count * _RUN.size)))
    inside = all(size and offset + size <= block_bytes for offset, size in runs)
    if not inside or sum(size for _, size in runs) > block_bytes:
        raise TransferError("Runs of bytes were asked for that no block has.")
    return runs


def send_request(sock: socket.socket, ids: Sequence[int]) -> None:
    """Ask for blocks, at most MAX_BLOCKS_PER_READ of them."""
    send_buffers(sock, [struct.pack(f"<{len(ids) + 1}I", len(ids), *ids)])


def receive_request(sock: socket.socket, timeout_s: float) -> list[int] | None:
    """Wait for a request without a limit, and for its rest `timeout_s`; None: the client is gone.

    Raises:
        TransferError: it asks for too much.
    """
    sock.settimeout(None)
    head = sock.recv(_COUNT.size)
    if not head:
        return None
    sock.settimeout(timeout_s)
    head += receive_exactly(sock, _COUNT.size - len(head))
    (count,) = _COUNT.unpack(head)
    if not 0 < count <= MAX_BLOCKS_PER_READ:
        raise TransferError(
            f"A READ of {count} blocks was asked, allowed are {MAX_BLOCKS_PER_READ}."
        )
    return list(struct.unpack(f"<{count}I", receive_exactly(sock, 4 * count)))


def send_reply(sock: socket.socket, slices: Iterable[memoryview]) -> None:
    """Answer with bytes of blocks."""
    send_buffers(sock, chain([_COUNT.pack(0)], slices))


def send_error(sock: socket.socket, message: str) -> None:
    """Answer with the reason why not."""
    text = message.encode()[:MAX_ERROR_BYTES]
    send_buffers(sock, [_COUNT.pack(len(text)), text])


def receive_reply(sock: socket.socket, into: Iterable[memoryview]) -> None:
    """Fill own blocks with the answer.

    Raises:
        TransferError: the server refused.
    """
    (length,) = _COUNT.unpack(receive_exactly(sock, _COUNT.size))
    if length:
        text = receive_exactly(sock, min(length, MAX_ERROR_BYTES)).decode(errors="replace")
        raise TransferError(f"The peer refused a READ: {text}")
    receive_buffers(sock, into)


def deadline_socket(host: str, timeout_s: float) -> socket.socket:
    """A socket of an IP address's family that is not connected yet, tuned, with a timeout."""
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    tune(sock)
    sock.settimeout(timeout_s)
    return sock
