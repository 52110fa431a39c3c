"""What facts about the host mean, and that facts are gathered from the real machine."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diptych.doctor.finding import Finding, Level
from diptych.doctor.host import HostFacts, driver_version, look_at_host, probe, rdma_devices, taken
from diptych.doctor.host_checks import check_host
from diptych.doctor.settings import DoctorSettings, inherited, is_worker

GPU = {"name": "NVIDIA H200", "capability": [9, 0], "memory_bytes": 1 << 37}
GOOD = HostFacts(
    python="3.11.7",
    packages={
        "torch": {"version": "2.11.0", "cuda": "13.0", "gpus": [GPU]},
        "flashinfer": {"version": "0.6.13"},
        "nixl": {"version": "1.5.1"},
    },
    driver="580.1",
    rdma={"mlx5_0": "ACTIVE", "mlx5_1": "DOWN"},
    transports=("cuda", "ib"),
    shm_bytes=8 << 30,
    memlock_bytes=None,
    model="/models/m",
    model_digest="ab" * 16,
    ports={9001: ""},
)


def found(facts: HostFacts, *, worker: bool = True) -> dict[str, Finding]:
    return {each.check: each for each in check_host(facts, worker=worker)}


def with_torch(**torch: Any) -> dict[str, Any]:
    return {"packages": {**GOOD.packages, "torch": {**GOOD.packages["torch"], **torch}}}


def test_a_good_host_has_nothing_to_mend() -> None:
    assert {each.level for each in found(GOOD).values()} == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "level", "says"),
    [
        (
            {"packages": {**GOOD.packages, "torch": {"error": "no module"}}},
            *("torch", "fail", "diptych[worker]"),
        ),
        (with_torch(gpus=[]), "gpu", "fail", "nvidia.com/gpu"),
        (with_torch(cuda=None, gpus=[]), "gpu", "warn", "torch with CUDA"),
        ({**with_torch(gpus=[]), "driver": ""}, "gpu", "warn", "node with GPUs"),
        (with_torch(gpus=[GPU | {"capability": [7, 5]}]), "gpu", "warn", "torch_native"),
        (
            {"packages": {**GOOD.packages, "flashinfer": {"error": "x"}}},
            *("flashinfer", "warn", "diptych[gpu]"),
        ),
        ({"packages": {**GOOD.packages, "nixl": {"error": "x"}}}, "nixl", "warn", "diptych[nixl]"),
        ({"rdma": {}}, "rdma", "warn", "rdma/ib"),
        ({"rdma": {"mlx5_0": "DOWN"}}, "rdma", "fail", "ibstat"),
        ({"ucx_tls": "tcp,cuda_copy"}, "rdma", "fail", "UCX_TLS"),
        ({"memlock_bytes": 8 << 20}, "memlock", "fail", "IPC_LOCK"),
        ({"shm_bytes": 64 << 20}, "shm", "warn", "medium: Memory"),
        ({"ports": {9001: "Address already in use"}}, "port 9001", "fail", "ss -ltnp"),
        ({"model_error": "Folder /m does not exist."}, "model", "fail", "mounted"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    change: dict[str, Any], check: str, level: str, says: str
) -> None:
    finding = found(replace(GOOD, **change))[check]
    assert finding.level == level
    assert says in finding.remedy


def test_rdma_is_not_ruled_out_by_what_allows_it() -> None:
    for tls in ("", "all", "rc,cuda", "ib,tcp", "^tcp", "rc_x,sm"):
        assert found(replace(GOOD, ucx_tls=tls))["rdma"].level is Level.OK, tls
    no_rdma = replace(GOOD, rdma={}, memlock_bytes=8 << 20)
    assert found(no_rdma)["memlock"].level is Level.OK, "nothing needs to be pinned"


def test_a_router_needs_no_gpu() -> None:
    bare = HostFacts(python="3.11.7")
    levels = {each.check: each.level for each in check_host(bare, worker=False)}
    assert levels == {"python": Level.OK, "gpu": Level.SKIP, "model": Level.SKIP}


def test_facts_come_from_this_machine(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listening:
        port = listening.getsockname()[1]
        facts = look_at_host(str(tmp_path / "absent"), [port], packages=False)
        assert facts.ports[port]
    assert taken(port) == ""
    assert "does not exist" in facts.model_error
    assert facts.shm_bytes > 0


def test_packages_are_asked_in_a_process_of_their_own() -> None:
    assert "version" in probe("nixl")
    assert "ended the process" in probe("crash")["error"]


def test_devices_and_driver_are_read_as_the_kernel_shows_them(tmp_path: Path) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / "infiniband" / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    found = rdma_devices(tmp_path / "infiniband")
    assert found == {"mlx5_0": "ACTIVE", "mlx5_1": "DOWN"}
    assert rdma_devices(tmp_path / "none") == {}
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue\nGCC 12\n")
    assert driver_version(version) == "580.159.04"
    assert driver_version(tmp_path / "none") == ""


def test_settings_of_the_pod_are_taken_where_none_are_given() -> None:
    environment = {
        "DIPTYCH_ROUTER_PREFILL": "p:9001,q:9001",
        "DIPTYCH_DECODE_AUTH_TOKEN": "secret",
        "DIPTYCH_DECODE_MODEL": "/m",
    }
    taken = inherited(DoctorSettings(model="/given", timeout_s=2), environment)
    assert taken.prefill == ("p:9001", "q:9001")
    assert taken.auth_token is not None
    assert taken.auth_token.get_secret_value() == "secret"
    assert (taken.model, taken.decode, taken.timeout_s) == ("/given", None, 2)
    assert is_worker("auto", environment)
    assert not is_worker("auto", {"DIPTYCH_ROUTER_PORT": "1"})
    assert is_worker("worker", {})
    assert not is_worker("elsewhere", environment)
