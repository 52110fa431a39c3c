"""What a user says about a worker's device, memory and steps, and what the engine hears of it."""

import pytest

from core.errors import ConfigError
from core.settings import load
from engine.config import EngineConfig
from worker.settings import WorkerSettings, engine_config


def settings(*argv: str) -> WorkerSettings:
    return load(WorkerSettings, argv, prog="worker", env_prefix="TEST_WORKER_")


def test_nothing_said_leaves_every_choice_to_the_device() -> None:
    config = engine_config(settings())
    assert (config.device, config.attention_backend) == ("auto", "auto")
    assert config.kv_cache_bytes is config.num_blocks is None
    assert config.max_num_seqs is config.max_step_tokens is config.max_chunk_tokens is None
    plain = EngineConfig(model=config.model)
    assert config.gpu_memory_utilization == plain.gpu_memory_utilization
    assert config.cuda_graphs is plain.cuda_graphs
    assert config.host_kv_bytes == plain.host_kv_bytes == 0


def test_what_was_said_reaches_the_engine() -> None:
    config = engine_config(
        settings(
            *("--device=cuda:3", "--kv-cache-memory=3GiB", "--gpu-memory-utilization=0.25"),
            *("--attention-backend=torch_native", "--no-cuda-graphs"),
            *("--max-num-seqs=7", "--max-step-tokens=99", "--max-chunk-tokens=33"),
            "--host-kv-memory=8GiB",
        )
    )
    assert config.device == "cuda:3"
    assert (config.kv_cache_bytes, config.gpu_memory_utilization) == (3 << 30, 0.25)
    assert config.host_kv_bytes == 8 << 30
    assert (config.attention_backend, config.cuda_graphs) == ("torch_native", False)
    assert (config.max_num_seqs, config.max_step_tokens, config.max_chunk_tokens) == (7, 99, 33)


def test_memory_can_be_left_to_the_device_again() -> None:
    assert settings("--kv-cache-memory=none").kv_cache_memory is None


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--device=gpu", r"device = 'gpu'.*as in cuda:0"),
        ("--device=cuda:", "as in cuda:0"),
        ("--gpu-memory-utilization=0", "greater than 0"),
        ("--gpu-memory-utilization=90", "less than or equal to 1"),
        ("--kv-cache-memory=0", "kv_cache_memory"),
        ("--attention-backend=fa3", "'auto', 'torch_native' or 'flashinfer'"),
        ("--max-num-seqs=0", "max_num_seqs"),
        ("--host-kv-memory=-1", "host_kv_memory"),
    ],
)
def test_wrong_values_are_refused_with_what_would_be_right(option: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        settings(option)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--node-rank=1", "node_rank is 1, but nodes is 1"),
        ("--nodes=2 --node-rank=2 --tensor-parallel-size=2", "numbered from 0"),
        ("--nodes=2", "tensor_parallel_size is 1, which 2 nodes can't share"),
        ("--nodes=2 --tensor-parallel-size=3", "is 3, which 2 nodes can't share"),
        ("--nodes=2 --tensor-parallel-size=2 --node-rank=1", "give leader_address"),
        (
            "--nodes=2 --tensor-parallel-size=2 --node-rank=1 --leader-address=ten",
            "give leader_address, host:port",
        ),
        ("--nodes=2 --tensor-parallel-size=2 --host=0.0.0.0", "set advertise_host"),
        ("--placement=ray", "set nodes to 2"),
        (
            "--placement=ray --nodes=2 --tensor-parallel-size=2 --node-rank=1 "
            "--leader-address=ten:9001",
            "start node 0 alone",
        ),
        (
            "--placement=ray --nodes=2 --tensor-parallel-size=2 --ray-address=ray://ten:10001",
            "ray_address is ray://ten:10001: give host:port",
        ),
        (
            "--placement=ray --nodes=2 --tensor-parallel-size=2 --device=cuda:1",
            "Ray chooses among the GPUs",
        ),
    ],
)
def test_nodes_that_can_not_work_are_refused(options: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        settings(*options.split())


def test_one_command_serves_all_nodes() -> None:
    common = "--nodes=2 --tensor-parallel-size=4 --leader-address=ten:9001 --host=0.0.0.0"
    for rank, address in enumerate(("10.0.0.1", "10.0.0.2")):
        own = settings(*common.split(), f"--node-rank={rank}", f"--advertise-host={address}")
        assert (own.own_host, own.loopback, own.rendezvous_port) == (address, False, 9201)
        assert engine_config(own).ranks_per_node == 2
