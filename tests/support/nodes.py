"""A leader of several nodes without an engine, in this process: its service on a real port."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from core.clock import monotonic
from engine.build import build_executor
from engine.executor import Executor
from engine.parallel.meeting import Meeting
from engine.parallel.peers import OtherNodes
from engine.parallel.pipe import RankPipe
from prefill.settings import PrefillSettings
from rpc.auth import Credentials
from rpc.server import RpcServer, build_server
from rpc.v1 import nodes_pb2_grpc
from tests.support.process import free_port
from worker.leading import NODES_SERVICE, NodesService
from worker.settings import engine_config

TOKEN = "test-token"
CREDENTIALS = Credentials(token=TOKEN)


def node_settings(model: Path, **changes: object) -> PrefillSettings:
    """Of the leader of two nodes of a rank each; `changes` make those of another node."""
    values: dict[str, object] = {
        "model": str(model),
        # As users leave it; but ranks of one host can't share its GPU.
        "device": "cpu" if torch.cuda.is_available() else "auto",
        "num_blocks": 64,
        "num_threads": 1,
        "kv_transport": "tcp",
        "nodes": 2,
        "tensor_parallel_size": 2,
        "rendezvous_port": 0,
        "node_timeout_s": 5.0,
        "start_timeout_s": 30.0,
        "auth_token": TOKEN,
    }
    return PrefillSettings.model_validate(values | changes)


def follower_settings(model: Path, leader: str, **changes: object) -> PrefillSettings:
    """Of node 1, at an address of its own."""
    own = {"node_rank": 1, "leader_address": leader, "host": "127.0.0.2", "port": free_port()}
    return node_settings(model, **(own | changes))


@dataclass
class Leader:
    """What it serves, where, and the engine's end of node 1's pipe."""

    service: NodesService
    server: RpcServer
    address: str
    ranks: RankPipe
    """What an engine would have; not to be used beside `executor`."""

    def executor(self, settings: PrefillSettings) -> Executor:
        """Rank 0 in this process, joined with the other node's; blocks until that is there."""
        told = self.service.engine_ends.message
        meeting = Meeting(
            leader_host="127.0.0.1",
            port=told.rendezvous_port,
            name=told.rendezvous_name,
            listen_fd=socket.dup(told.listen_fd),
        )
        pipes = [socket.socket(fileno=socket.dup(told.pipe_fds[0]))]
        self.service.engine_ends.close()
        self.ranks.close()
        elsewhere = OtherNodes(pipes=pipes, meeting=meeting)
        return build_executor(engine_config(settings), elsewhere=elsewhere)

    async def receive(self) -> tuple[int, bytes, int]:
        """The next frame that reaches rank 0."""
        kind, body, rank = await asyncio.to_thread(self.ranks.receive)
        return kind, body, rank


@asynccontextmanager
async def leading(
    settings: PrefillSettings, credentials: Credentials = CREDENTIALS
) -> AsyncIterator[Leader]:
    """Serve the nodes of a leader."""
    service = await NodesService.open(settings, "prefill", monotonic)
    server = build_server(credentials, services=[NODES_SERVICE])
    nodes_pb2_grpc.add_NodesServicer_to_server(service, server.grpc_server)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    (fd,) = service.engine_ends.message.pipe_fds
    ranks = RankPipe(socket.socket(fileno=socket.dup(fd)), timeout_s=10.0)
    try:
        yield Leader(service, server, f"127.0.0.1:{port}", ranks)
    finally:
        await service.dismiss("the test is over")
        service.close()
        ranks.close()
        await server.stop(0)
