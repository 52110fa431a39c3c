"""Ranks that others have started: what rank 0 asks of their pipes, and whom it blames."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError, DiptychError, ErrorCode
from engine.config import EngineConfig
from engine.executor import ExecutorLostError
from engine.kv.host_memory import num_host_blocks
from engine.kv.pool import kv_layout
from engine.models.config import read_model_config
from engine.parallel.children import RankProcesses
from engine.parallel.meeting import Meeting, read_start, start_message
from engine.parallel.pipe import Frame, PipeClosedError, RankPipe, failure_to
from engine.parallel.shares import rank_device
from engine.threads import rank_threads
from tests.support.models import make_checkpoint
from tests.support.process import wait_until

SOON_S = 5.0


class Nodes:
    """Two nodes of one rank each, as rank 0 sees them, and their ends of the pipes."""

    def __init__(self, stack: ExitStack) -> None:
        self.ranks = RankProcesses(rank_timeout_s=SOON_S)
        pairs = [socket.socketpair() for _ in range(2)]
        self.ends = [RankPipe(theirs, SOON_S) for _, theirs in pairs]
        for rank, end in enumerate(self.ends, 1):
            end.rank = rank
            stack.callback(end.close)
        self.ranks.start([], [], env={}, store_fd=None, nodes=[ours for ours, _ in pairs])
        stack.callback(self.ranks.close)

    def be_ready(self) -> None:
        for end in self.ends:
            end.send(Frame.READY)
        self.ranks.wait_ready(SOON_S)

    def error(self) -> str:
        wait_until(lambda: self.ranks.error, SOON_S, "the watch to notice")
        assert self.ranks.error is not None
        return self.ranks.error.message


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ExitStack() as stack:
        built = Nodes(stack)
        yield built
        for end in built.ends:  # so that closing waits for nobody
            end.close()


def test_each_node_is_sent_every_frame_and_answers_by_rank(nodes: Nodes) -> None:
    nodes.be_ready()
    assert nodes.ranks.count == 2 and nodes.ranks.pids == []
    nodes.ranks.send(Frame.PLAN, b"plan")
    for end in nodes.ends:
        assert end.receive()[:2] == (Frame.PLAN, b"plan")
        end.send(Frame.SIDE, b"side")
    heard: list[tuple[int, bytes]] = []
    wait_until(lambda: heard.extend(nodes.ranks.side.receive(0.1)) or len(heard) == 2, SOON_S, "")
    assert sorted(heard) == [(1, b"side"), (2, b"side")]


def test_a_lost_node_is_blamed_rather_than_the_ranks_that_fail_with_it(nodes: Nodes) -> None:
    nodes.be_ready()
    nodes.ends[0].send(Frame.FAILED, failure_to(RuntimeError("connection reset by a rank")))
    nodes.ends[0].close()
    nodes.ends[1].send(Frame.LOST, b"Node 2 (ten) was lost: no sign of life for 9 s.")
    assert nodes.error().startswith("Node 2 (ten) was lost: no sign of life for 9 s.")
    with pytest.raises(ExecutorLostError, match="Node 2"):
        nodes.ranks.check()
    with pytest.raises(PipeClosedError):  # whoever stands in for the other node hears of it
        nodes.ends[1].receive()


def test_a_rank_that_fails_alone_is_blamed(nodes: Nodes) -> None:
    nodes.be_ready()
    nodes.ends[0].send(Frame.FAILED, failure_to(RuntimeError("no memory")))
    nodes.ends[0].send(Frame.LOST, b"Node 1 was lost: rank 1 ended with status 1.")
    assert nodes.error().startswith("Rank 1 on node 1 failed: RuntimeError: no memory")


def test_a_rank_that_can_not_load_is_blamed_at_once_with_its_code(nodes: Nodes) -> None:
    nodes.ends[1].send(Frame.FAILED, failure_to(ConfigError("no such model")))
    with pytest.raises(DiptychError, match="Rank 2 on node 2 failed: no such model") as raised:
        nodes.ranks.wait_ready(SOON_S)
    assert raised.value.code is ErrorCode.CONFIG


def test_ranks_of_a_node_that_never_came_are_named(nodes: Nodes) -> None:
    nodes.ends[0].send(Frame.READY)
    with pytest.raises(DiptychError, match=r"Ranks \[2\] were not ready within"):
        nodes.ranks.wait_ready(0.3)


def test_closing_waits_until_nodes_have_closed_their_pipes(nodes: Nodes) -> None:
    nodes.be_ready()
    nodes.ranks.begin_close()
    for end in nodes.ends:
        assert end.receive().kind is Frame.CLOSE
        end.close()
    began = time.monotonic()
    nodes.ranks.close()
    assert nodes.ranks.error is None and time.monotonic() - began < SOON_S


def test_a_start_message_says_everything() -> None:
    config = EngineConfig(model="m", tensor_parallel_size=4, nodes=2)
    meeting = Meeting(own_host="b", leader_host="a", port=7, name="n")
    assert read_start(start_message(config, 3, meeting)) == (config, 3, meeting)


def test_ranks_share_what_their_own_host_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model="m", device="cuda:1", num_threads=8, host_kv_bytes=1 << 20)
    spread = replace(config, tensor_parallel_size=4, nodes=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [rank_device(spread, rank).index for rank in range(4)] == [1, 2, 1, 2]
    with pytest.raises(ConfigError, match="4 ranks from cuda:1 on need 5 GPUs"):
        rank_device(replace(spread, nodes=1), 0)
    assert rank_threads(spread) == 4
    layout = kv_layout(read_model_config(make_checkpoint(tmp_path)), 16, torch.float32)
    blocks = num_host_blocks(spread, layout)
    assert blocks == (1 << 19) // layout.block_bytes
