"""A leader and its nodes over real gRPC: who may join, what is carried, how a loss is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from prometheus_client import CollectorRegistry, generate_latest

from engine.parallel.pipe import Frame, frame
from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.v1 import nodes_pb2 as pb
from rpc.v1 import nodes_pb2_grpc
from tests.support.models import make_checkpoint
from tests.support.nodes import CREDENTIALS, Leader, leading, node_settings
from worker.agreement import agreed
from worker.engine_child import EngineFailedError
from worker.leading import NodeLostError

SOON_S = 10.0
ENDED = (EOFError, grpc.RpcError)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


class Node:
    """Another node's stream, as a test drives it."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def send(self, **body: Any) -> None:
        await self._call.write(pb.NodeMessage(**body))

    async def heard(self) -> pb.LeaderMessage:
        """The next message that is more than a sign of life."""
        async with asyncio.timeout(SOON_S):
            while True:
                message = await self._call.read()
                if not isinstance(message, pb.LeaderMessage):
                    raise EOFError(await self._call.code())
                if message.WhichOneof("body"):
                    return message


@asynccontextmanager
async def stream(leader: Leader, credentials: Credentials = CREDENTIALS) -> AsyncIterator[Node]:
    async with open_channel(leader.address, credentials) as channel:
        call = nodes_pb2_grpc.NodesStub(channel).Join()
        yield Node(call)
        call.cancel()


def hello(model: Path, node_rank: int = 1, **changes: str) -> pb.NodeHello:
    terms = agreed(node_settings(model), "prefill") | changes
    return pb.NodeHello(node_rank=node_rank, host="ten", agreed=terms)


async def lost(leader: Leader) -> str:
    async with asyncio.timeout(SOON_S):
        with pytest.raises(NodeLostError) as raised:
            await leader.service.watch()
    assert leader.service.lost == str(raised.value)
    return str(raised.value)


async def test_frames_go_to_the_node_as_they_come_and_come_back_whole(model: Path) -> None:
    async with leading(node_settings(model)) as leader, stream(leader) as node:
        await node.send(hello=hello(model))
        told = (await node.heard()).hello
        assert told.rendezvous_port and told.rendezvous_name and told.silence_ms == 5000
        assert leader.service.missing == ""
        leader.ranks.send(Frame.PLAN, b"x" * 1_000_000)
        expected = frame(Frame.PLAN, b"x" * 1_000_000)
        got = b""
        while len(got) < len(expected):
            got += (await node.heard()).frames
        assert got == expected
        for body in (b"", b"y" * 1_000_000):
            await node.send(frames=frame(Frame.SIDE, body, rank=1))
            assert await leader.receive() == (Frame.SIDE, body, 1)
        registry = CollectorRegistry()
        leader.service.register(registry)
        assert b"diptych_nodes_joined 1.0" in generate_latest(registry)
        await node.send(stopping=pb.NodeStopping())
        async with asyncio.timeout(SOON_S):
            await leader.service.stopping.wait()


@pytest.mark.parametrize(
    ("greeting", "code", "said"),
    [
        (
            {"max_model_len": "9"},
            "FAILED_PRECONDITION",
            "max_model_len is not set on the leader and 9",
        ),
        ({"version": "0.0.1"}, "FAILED_PRECONDITION", "version is .* and 0.0.1 on node 1"),
        ({"model digest": "00"}, "FAILED_PRECONDITION", "model digest is .* and 00 on node 1"),
        ({"role": "decode"}, "FAILED_PRECONDITION", "role is prefill .* and decode on node 1"),
        ({"node_rank": 2}, "FAILED_PRECONDITION", "no node 2 here: nodes is 2"),
        ({"node_rank": 0}, "FAILED_PRECONDITION", "no node 0 here"),
    ],
)
async def test_who_differs_is_told_in_what_and_may_not_join(
    model: Path, caplog: pytest.LogCaptureFixture, greeting: Any, code: str, said: str
) -> None:
    async with leading(node_settings(model)) as leader, stream(leader) as node:
        await node.send(hello=hello(model, **greeting))
        with pytest.raises(ENDED, match=f"(?s){code}.*{said}"):
            await node.heard()
        assert leader.service.missing.startswith("node 1")
        if "node_rank" not in greeting:
            assert "node 1 at ten may not join" in caplog.text
            assert "refused: " in leader.service.missing


async def test_strangers_and_second_comers_are_refused(model: Path) -> None:
    async with leading(node_settings(model)) as leader:
        for token in (None, "wrong"):
            async with stream(leader, Credentials(token=token)) as stranger:
                with pytest.raises(ENDED, match="UNAUTHENTICATED"):
                    await stranger.send(hello=hello(model))
                    await stranger.heard()
        async with stream(leader) as silent:
            await silent.send(frames=b"?")
            with pytest.raises(ENDED, match="INVALID_ARGUMENT"):
                await silent.heard()
        async with stream(leader) as node, stream(leader) as second:
            await node.send(hello=hello(model))
            await node.heard()
            await second.send(hello=hello(model))
            with pytest.raises(ENDED, match="ALREADY_EXISTS"):
                await second.heard()


async def test_a_node_that_falls_silent_is_lost(model: Path) -> None:
    async with leading(node_settings(model, node_timeout_s=1.5)) as leader:
        async with stream(leader) as node:
            await node.send(hello=hello(model))
            await node.heard()
            for _ in range(5):  # signs of life keep it, however little they say
                await node.send()
                await asyncio.sleep(0.4)
            assert not leader.service._lost.done()
            assert await lost(leader) == "Node 1 (ten) was lost: no sign of life for 1.5 s."
        kind, body, _ = await leader.receive()
        assert (kind, body.decode()) == (Frame.LOST, await lost(leader))


@pytest.mark.parametrize("reason", ["rank 1 ended with status 1", None])
async def test_a_node_that_ends_is_lost_for_the_reason_it_gives(
    model: Path, reason: str | None
) -> None:
    async with leading(node_settings(model)) as leader:
        async with stream(leader) as node:
            await node.send(hello=hello(model))
            await node.heard()
            if reason:
                await node.send(end=pb.NodeEnd(reason=reason))
                assert await lost(leader) == f"Node 1 (ten) was lost: {reason}."
        assert await lost(leader) == f"Node 1 (ten) was lost: {reason or 'its connection broke'}."
        assert (await leader.receive())[0] == Frame.LOST


async def test_a_node_whose_ranks_ended_with_rank_0_is_not_lost(model: Path) -> None:
    async with leading(node_settings(model)) as leader, stream(leader) as node:
        await node.send(hello=hello(model))
        await node.heard()
        await node.send(end=pb.NodeEnd())
        with pytest.raises(EOFError, match="OK"):
            await node.heard()
        assert not leader.service._lost.done()


async def test_nodes_are_told_why_when_the_engine_or_the_worker_ends(model: Path) -> None:
    async with leading(node_settings(model)) as leader, stream(leader) as node:
        await node.send(hello=hello(model))
        await node.heard()
        leader.service.engine_ends.close()
        leader.ranks.close()
        assert "gave its ranks up" in (await node.heard()).end.reason
        async with asyncio.timeout(SOON_S):
            with pytest.raises(EngineFailedError):
                await leader.service.watch()
        assert not leader.service.lost
    async with leading(node_settings(model)) as leader, stream(leader) as node:
        await node.send(hello=hello(model))
        await node.heard()
        await leader.service.dismiss("Node 2 was lost.")
        assert (await node.heard()).end.reason == "Node 2 was lost."


async def test_certificates_let_nodes_in_as_a_token_does(model: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    trusting = Credentials(ca=tmp_path / "ca")
    known = Credentials(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key")
    async with leading(node_settings(model), known) as leader:
        async with stream(leader, trusting) as stranger:
            with pytest.raises(ENDED, match="UNAVAILABLE"):
                await stranger.send(hello=hello(model))
                await stranger.heard()
        async with stream(leader, known) as node:
            await node.send(hello=hello(model))
            assert (await node.heard()).HasField("hello")
