"""What a stranger can and can't do to the TCP transport."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from core.errors import TransferError
from kvtransfer import tcp_frames as frames
from kvtransfer import tcp_server
from kvtransfer.pool_memory import block_slices
from kvtransfer.tcp import TcpTransport
from kvtransfer.tcp_server import TcpServer
from kvtransfer.transport import ReadState
from tests.support.kv import HostPool, finish
from tests.support.process import wait_until

TOKEN = b"secret"


@pytest.fixture
def server() -> Iterator[TcpServer]:
    pool = HostPool(4, 4096)
    pool.fill(1)
    server = TcpServer(pool, host="127.0.0.1", token=TOKEN)
    yield server
    server.close()


def dial(server: TcpServer) -> socket.socket:
    return socket.create_connection((server.metadata.host, server.metadata.port), timeout=5)


def closed(sock: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        while sock.recv(4096):
            pass
    return True


def test_proof_of_another_pool_or_token_is_refused(server: TcpServer) -> None:
    for token, nonce in ((b"guess", server.metadata.pool_nonce), (TOKEN, b"n" * 32)):
        with dial(server) as sock, pytest.raises(TransferError, match="token"):
            frames.greet_as_client(sock, token, nonce)


def test_replayed_proof_is_refused(server: TcpServer) -> None:
    with dial(server) as first:
        challenge = frames.receive_exactly(first, len(frames.MAGIC) + frames.NONCE_BYTES)
        answer = b"a" * frames.NONCE_BYTES
        key = TOKEN + server.metadata.pool_nonce
        proof = frames._proof(key, b"client", challenge[len(frames.MAGIC) :], answer)
        first.sendall(answer + proof)
        assert len(frames.receive_exactly(first, frames.PROOF_BYTES)) == frames.PROOF_BYTES
    with dial(server) as second:
        frames.receive_exactly(second, len(frames.MAGIC) + frames.NONCE_BYTES)
        second.sendall(answer + proof)
        assert closed(second)


def test_server_without_the_token_is_not_believed() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def impostor() -> None:
        sock, _ = listener.accept()
        sock.sendall(frames.MAGIC + bytes(frames.NONCE_BYTES))
        frames.receive_exactly(sock, frames.NONCE_BYTES + frames.PROOF_BYTES)
        sock.sendall(bytes(frames.PROOF_BYTES))
        closed(sock)
        sock.close()

    thread = threading.Thread(target=impostor)
    thread.start()
    with (
        socket.create_connection(listener.getsockname(), timeout=5) as sock,
        pytest.raises(TransferError, match="token"),
    ):
        frames.greet_as_client(sock, TOKEN, b"n" * 32)
    thread.join(5)
    listener.close()


def test_request_out_of_range_or_too_long_gets_no_bytes(server: TcpServer) -> None:
    with dial(server) as sock:
        frames.greet_as_client(sock, TOKEN, server.metadata.pool_nonce)
        frames.send_runs(sock, [(0, 4096)])
        frames.send_request(sock, [4])
        with pytest.raises(TransferError, match="outside"):
            frames.receive_reply(sock, [memoryview(bytearray(4096))])
        sock.sendall(struct.pack("<I", frames.MAX_BLOCKS_PER_READ + 1))
        assert closed(sock)


@pytest.mark.parametrize(
    "runs", [[], [(0, 0)], [(0, 4097)], [(4096, 1)], [(1 << 63, 1)], [(0, 4096), (0, 1)]]
)
def test_runs_that_no_block_has_get_no_bytes(
    server: TcpServer, runs: list[tuple[int, int]]
) -> None:
    with dial(server) as sock:
        frames.greet_as_client(sock, TOKEN, server.metadata.pool_nonce)
        frames.send_runs(sock, runs)
        assert closed(sock)


def test_too_many_runs_are_refused_before_they_are_read(server: TcpServer) -> None:
    with dial(server) as sock:
        frames.greet_as_client(sock, TOKEN, server.metadata.pool_nonce)
        sock.sendall(struct.pack("<I", frames.MAX_RUNS + 1))
        assert closed(sock)


def test_connections_are_bounded(server: TcpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "MAX_CONNECTIONS", 1)
    with dial(server) as first, dial(server) as second:
        frames.greet_as_client(first, TOKEN, server.metadata.pool_nonce)
        assert closed(second)


def test_close_cuts_connected_readers() -> None:
    pool = HostPool(4, 4096)
    served = TcpTransport(pool, host="127.0.0.1", token=TOKEN)
    reader = TcpTransport(HostPool(4, 4096), host="127.0.0.1", token=TOKEN)
    reader.connect("p", served.metadata())
    assert finish(reader.read("p", [(0, 0)])) is ReadState.DONE
    served.close()
    assert finish(reader.read("p", [(0, 0)])) is ReadState.FAILED
    reader.close()


def test_peer_that_nobody_serves_fails_reads_and_refuses_more() -> None:
    gone = TcpTransport(HostPool(4, 4096), host="127.0.0.1", token=TOKEN)
    metadata = gone.metadata()
    gone.close()
    reader = TcpTransport(HostPool(4, 4096), host="127.0.0.1", token=TOKEN)
    reader.connect("p", metadata)

    def refused() -> bool:
        try:
            return finish(reader.read("p", [(0, 0)])) is ReadState.DONE
        except TransferError as error:
            return "p is lost" in error.message

    wait_until(refused, 5, "the peer to be known as lost")
    reader.close()


def test_disconnect_from_a_host_that_never_answers_is_quick() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        template = TcpTransport(HostPool(4, 4096), host="127.0.0.1", token=TOKEN)
        metadata = frames.TcpMetadata.unpack(template.metadata())
        silent = frames.TcpMetadata(
            host="127.0.0.1",
            port=listener.getsockname()[1],
            pool_nonce=metadata.pool_nonce,
            num_blocks=4,
            block_bytes=4096,
        )
        template.connect("p", silent.pack())
        read = template.read("p", [(0, 0)])
        assert read.poll() is ReadState.PENDING
        ended = threading.Event()

        def disconnect() -> None:
            template.disconnect("p")
            ended.set()

        threading.Thread(target=disconnect, daemon=True).start()
        assert ended.wait(1.0)
        assert read.poll() is ReadState.FAILED
        template.close()
    listener.close()


def test_adjacent_blocks_become_one_slice() -> None:
    view = memoryview(bytearray(range(40)))
    slices = block_slices(view, [0, 1, 2, 7, 6, 9], 4, [(0, 4)])
    assert [(bytes(s)[0], len(s)) for s in slices] == [(0, 12), (28, 4), (24, 4), (36, 4)]


def test_runs_of_blocks_are_sliced_in_order() -> None:
    view = memoryview(bytearray(range(40)))
    slices = block_slices(view, [2, 3], 10, [(0, 3), (3, 1), (9, 1)])
    assert [bytes(s) for s in slices] == [bytes(range(20, 24)), bytes(range(29, 34)), b"\x27"]
    assert list(block_slices(view, [], 10, [(0, 3)])) == []


def test_metadata_round_trip_and_names_are_refused() -> None:
    metadata = frames.TcpMetadata(
        host="::1", port=5, pool_nonce=b"n" * 32, num_blocks=1, block_bytes=2
    )
    assert frames.TcpMetadata.unpack(metadata.pack()) == metadata
    with pytest.raises(TransferError):
        frames.TcpMetadata.unpack(metadata.pack().replace(b"::1", b"localhost"))
