import socket
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.settings import load
from decode.settings import DecodeSettings
from diptych.cluster.plan import (
    ClusterPlan,
    free_ports,
    num_ports,
    plan_cluster,
    settle_port,
    threads_per_worker,
)
from diptych.cluster.settings import (
    CHOSEN_PER_PROCESS,
    PASSED_ON,
    ServeSettings,
    serve_settings_class,
    worker_options,
)
from prefill.settings import PrefillSettings
from router.settings import RouterSettings
from worker.settings import WorkerSettings

TOKEN = "the-token"


def settings(*argv: str) -> ServeSettings:
    return load(serve_settings_class(), argv, prog="diptych serve", env_prefix="DIPTYCH_SERVE_")


def plan(*argv: str, num_gpus: int = 0) -> ClusterPlan:
    return plan_cluster(
        settings(*argv),
        model_path=Path("/models/a"),
        token=TOKEN,
        ports=range(1000, 1100),
        parent_pid=7,
        num_gpus=num_gpus,
    )


def options(plan: ClusterPlan, name: str) -> list[str]:
    """What a child's own command line is given, after the launcher's wrapper."""
    (child,) = [c for c in plan.children if c.name == name]
    assert child.command[1:5] == ("-m", "diptych.cluster.child", "7", child.role)
    return list(child.command[5:])


def test_every_part_understands_the_options_that_it_is_given() -> None:
    made = plan(
        "--prefill=2", "--max-step-tokens=64", "--no-prefix-caching", "--max-model-len=none"
    )
    router = load(RouterSettings, options(made, "router"), prog="r", env_prefix="R_")
    prefill = load(PrefillSettings, options(made, "prefill-1"), prog="p", env_prefix="P_")
    decode = load(DecodeSettings, options(made, "decode-0"), prog="d", env_prefix="D_")
    assert router.prefill == ("127.0.0.1:1000", "127.0.0.1:1002")
    assert router.decode == ("127.0.0.1:1004",)
    assert (router.host, router.port, router.console) == ("127.0.0.1", 8000, True)
    assert (router.metrics_host, router.metrics_port) == ("127.0.0.1", 1006)
    assert (prefill.port, prefill.metrics_port) == (1002, 1003)
    assert prefill.worker_id == "prefill-1"
    for worker in (prefill, decode):
        assert worker.model == "/models/a"
        assert worker.served_model_name == "demo"
        assert worker.max_step_tokens == 64
        assert worker.prefix_caching is False
        assert worker.max_model_len is None


def test_router_starts_last_and_empty_pools_are_left_out() -> None:
    made = plan("--prefill=0", "--decode=2")
    assert [c.name for c in made.children] == ["decode-0", "decode-1", "router"]
    assert not any(o.startswith("--prefill") for o in options(made, "router"))


def test_token_travels_in_the_environment_only() -> None:
    for child in plan().children:
        assert child.env[f"DIPTYCH_{child.role.upper()}_AUTH_TOKEN"] == TOKEN
        assert not any(TOKEN in word for word in child.command)


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.1.2.3", "10.1.2.3"), ("::1", "[::1]")],
)
def test_url_can_be_used_on_this_machine(host: str, url: str) -> None:
    assert plan(f"--host={host}", "--port=81").base_url == f"http://{url}:81"


def test_keys_and_certificate_of_the_endpoint_reach_the_router() -> None:
    made = plan("--host=0.0.0.0", "--api-keys=k", "--http-tls-cert=c", "--http-tls-key=d")
    router = load(RouterSettings, options(made, "router"), prog="r", env_prefix="R_")
    assert (router.api_keys, router.http_tls_cert, router.http_tls_key) == ("k", "c", "d")
    assert made.base_url == "https://127.0.0.1:8000"
    # What the launcher itself looks at needs neither, and is for this machine alone.
    assert made.children[-1].metrics_url == f"http://127.0.0.1:{router.metrics_port}/metrics"
    assert num_ports(settings()) == 5


@pytest.mark.parametrize(
    ("model", "name"), [("demo", "demo"), ("/a/tiny-llama/", "tiny-llama"), ("x/b.gguf", "b.gguf")]
)
def test_model_is_served_under_the_last_part_of_its_path(model: str, name: str) -> None:
    assert plan(f"--model={model}").model_name == name


def test_every_worker_setting_is_either_passed_on_or_chosen() -> None:
    known = set(PASSED_ON) | CHOSEN_PER_PROCESS | set(ServeSettings.model_fields)
    assert set(WorkerSettings.model_fields) <= known
    assert set(WorkerSettings.model_fields) >= CHOSEN_PER_PROCESS


def test_worker_settings_are_checked_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="block_size"):
        settings("--block-size=0")
    with pytest.raises(ConfigError, match="--metrics-port"):
        settings("--metrics-port=1")


def test_only_what_was_set_is_passed_on() -> None:
    assert worker_options(settings()) == []
    assert worker_options(settings("--kv-cache-memory=1GiB", "--seed=1")) == [
        f"--kv-cache-memory={1 << 30}",
        "--seed=1",
    ]


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_taken_port_is_refused_by_its_number_and_zero_takes_a_free_one() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port}.*--port"):
            settle_port("127.0.0.1", port)
    assert settle_port("127.0.0.1", 0) > 0


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        settle_port("192.0.2.1", 8000)


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(2, 2, 2), (2, 4, 1), (2, 1, 2), (16, 4, 8), (1, 8, 1)]
)
def test_workers_share_the_cores(cores: int, workers: int, threads: int) -> None:
    assert threads_per_worker(cores, workers) == threads


def test_threads_that_the_user_chose_are_left_alone() -> None:
    chosen = [c for c in plan("--num-threads=3").children[0].command if "num-threads" in c]
    assert chosen == ["--num-threads=3"]


def places(made: ClusterPlan) -> list[tuple[str, float]]:
    """Device and share of its memory of each worker."""
    loaded = [
        load(WorkerSettings, options(made, child.name), prog="w", env_prefix="W_")
        for child in made.children
        if child.role != "router"
    ]
    return [(worker.device, worker.gpu_memory_utilization) for worker in loaded]


@pytest.mark.parametrize(
    ("argv", "num_gpus", "expected"),
    [
        ([], 0, [("auto", 0.9), ("auto", 0.9)]),
        ([], 1, [("cuda:0", 0.45), ("cuda:0", 0.45)]),
        ([], 2, [("cuda:0", 0.9), ("cuda:1", 0.9)]),
        ([], 8, [("cuda:0", 0.9), ("cuda:1", 0.9)]),
        (["--device=cuda"], 2, [("cuda:0", 0.9), ("cuda:1", 0.9)]),
        (["--device=cuda:1"], 2, [("cuda:1", 0.45), ("cuda:1", 0.45)]),
        (["--device=cpu"], 2, [("cpu", 0.9), ("cpu", 0.9)]),
        (["--gpu-memory-utilization=0.5"], 1, [("cuda:0", 0.25), ("cuda:0", 0.25)]),
        (["--decode=2"], 2, [("cuda:0", 0.45), ("cuda:1", 0.9), ("cuda:0", 0.45)]),
        (["--tensor-parallel-size=2"], 4, [("cuda:0", 0.9), ("cuda:2", 0.9)]),
        (["--tensor-parallel-size=2"], 3, [("cuda:0", 0.45), ("cuda:0", 0.45)]),
        (["--tensor-parallel-size=2"], 0, [("auto", 0.9), ("auto", 0.9)]),
    ],
)
def test_workers_take_gpus_in_turn_and_share_what_must_be_shared(
    argv: list[str], num_gpus: int, expected: list[tuple[str, float]]
) -> None:
    assert places(plan(*argv, num_gpus=num_gpus)) == expected


@pytest.mark.parametrize(
    ("argv", "num_gpus"),
    [
        (["--device=cuda"], 0),
        (["--device=cuda:2"], 2),
        (["--tensor-parallel-size=4"], 2),
        (["--device=cuda:1", "--tensor-parallel-size=2"], 2),
    ],
)
def test_more_gpus_than_there_are_are_refused_before_anything_starts(
    argv: list[str], num_gpus: int
) -> None:
    with pytest.raises(ConfigError, match=f"torch sees {num_gpus} .*--device cpu"):
        plan(*argv, num_gpus=num_gpus)
