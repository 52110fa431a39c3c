"""What images hold: installed by the steps of their Dockerfile, run as the chart's pods run."""

import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from scripts.install_image import CONSTRAINTS, CUDA_CONSTRAINTS, ROOT, complete_toolkit
from scripts.lock_cuda import NoAnswer, pinned, resolve
from tests.support.cluster import START_S
from tests.support.helm import Rendering, container, render
from tests.support.images import sent_to_builders, variables
from tests.support.pods import Pod, skip_without_rights
from tests.support.process import Process, http_status, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEP_S = 300
TOKEN = "token-of-the-release"
IMAGES = {"router": "router", "prefill": "worker-cpu", "decode": "worker-cpu"}
KERNEL = """
#include <cuda.h>
__global__ void twice(float *x) { x[threadIdx.x] *= 2; }
extern "C" void run(float *x) { cuInit(0); twice<<<1, 32>>>(x); cudaDeviceSynchronize(); }
"""
EVERY_MODULE = """
import importlib, pkgutil, sys
for name in ("core", "telemetry", "rpc", "router"):
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(module.name)
print(*sorted(sys.modules))
"""


@pytest.fixture
def cuda_resolution() -> dict[str, str]:
    try:
        return resolve(CONSTRAINTS, CUDA_CONSTRAINTS)
    except NoAnswer as unavailable:
        pytest.skip(f"no package index can be reached: {unavailable}")


@pytest.fixture
def installed(
    cuda_resolution: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Environments by image, of nothing but what a builder would be sent."""
    folder = tmp_path_factory.mktemp("images")
    source, product = folder / "source", folder / "product"
    sent_to_builders(source)
    environments = {image: folder / image for image in ("router", "worker-cpu")}
    for image, environment in environments.items():
        _step(source, "dependencies", image, str(environment))
        if image == "router":
            _step(source, "product", image, str(environment), "--to", str(product))
        # As in the Dockerfile: made once, and laid over each image's dependencies.
        shutil.copytree(product, environment, dirs_exist_ok=True)
        program = environment / "bin" / "diptych"
        _, _, rest = program.read_text().partition("\n")
        program.write_text(f"#!{environment}/bin/python\n{rest}")
        _step(source, "check", image, str(environment))
        # What several pods load is compiled once: they can't keep it, their roots are read-only.
        loaded = "router.main" if image == "router" else "decode.engine_process"
        subprocess.run(
            [str(environment / "bin" / "python"), "-c", f"import {loaded}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": ""},
            check=True,
        )
    yield environments
    shutil.rmtree(folder)


def _step(source: Path, *words: str) -> None:
    # Byte code of everything would only take time here. For pip, a variable of a negative option
    # says what the positive one is to be.
    env = {**os.environ, "PIP_NO_COMPILE": "no", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(source / "scripts" / "install_image.py"), *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_everything_in_the_image_with_cuda_is_pinned(cuda_resolution: dict[str, str]) -> None:
    pins = pinned(CONSTRAINTS) | pinned(CUDA_CONSTRAINTS)
    assert cuda_resolution.items() <= pins.items(), "run: python scripts/lock_cuda.py"
    # CUDA's headers refuse a compiler of another version.
    versions = {cuda_resolution[f"nvidia-cuda-{part}"] for part in ("nvcc", "crt", "runtime")}
    assert {version.rpartition(".")[0] for version in versions} == {"13.0"}


def test_compiler_of_the_image_with_cuda_builds(
    cuda_resolution: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("nvcc needs g++, which the image has")
    del cuda_resolution  # the index answers
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = project["optional-dependencies"]["nvcc"]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "lib" / version / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "-c", str(CUDA_CONSTRAINTS)]
    done = subprocess.run(
        [*pip, "--target", str(site), *packages], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    complete_toolkit(tmp_path)
    toolkit = site / "nvidia" / "cu13"
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL)
    libraries = [f"-L{toolkit}/lib64", f"-L{toolkit}/lib64/stubs", "-lcudart", "-lcuda"]
    words = ["-arch=sm_90a", "-shared", "-Xcompiler=-fPIC", "-Xlinker=--no-as-needed", *libraries]
    done = subprocess.run(
        [str(toolkit / "bin" / "nvcc"), *words, "-o", str(tmp_path / "kernel.so"), str(source)],
        env={"PATH": os.defpath, "CUDA_HOME": str(toolkit)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = (tmp_path / "kernel.so").read_bytes()
    assert b"libcuda.so.1\0" in built and b"libcudart.so.13\0" in built


def test_images_serve_as_pods_and_routers_have_no_torch(
    installed: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    # One test, because installing takes most of the time and test processes share nothing.
    _import_all_of_a_router(installed)
    skip_without_rights()
    # In float32 workers would first compile kernels, for half a minute.
    values = {
        "model": {"source": "pvc", "pvc": {"claimName": "models"}},
        "poolDefaults": {"config": {"kv_cache_memory": "64MiB", "dtype": "bfloat16"}},
    }
    rendering = render(values, profile="cpu")
    # The library that writes checkpoints keeps them to their owner.
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for file in model.iterdir():
        file.chmod(0o644)
    net = f"127.{random.randint(64, 250)}.8"
    hosts = {part: f"{net}.{number}" for number, part in enumerate(IMAGES, start=2)}
    peers = [f"--{role}={hosts[role]}:9001" for role in ("prefill", "decode")]
    words = {"router": ["--discovery=static", *peers]}
    url = f"http://{hosts['router']}:8000"
    with ExitStack() as stack:
        processes: list[Process] = []
        for part, host in hosts.items():
            environment = installed[IMAGES[part]]
            command = _pod(rendering, part, environment, model, tmp_path / part, host)
            command += [f"--host={host}", *words.get(part, [])]
            processes.append(stack.enter_context(running(command, name=part)))

        def logs() -> str:
            return "\n".join(each.log for each in processes)

        wait_until(lambda: _ready(url, processes), START_S, "both workers to be ready", logs)
        with (
            httpx.Client(trust_env=False) as http,
            OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            answer = client.completions.create(
                model="models", prompt="one two three four five", max_tokens=5
            )
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert 'routing_total{mode="disaggregated"} 1.0' in metrics, logs()
        assert '"warning"' not in logs() and "Read-only file system" not in logs(), logs()
        for each in processes:
            each.popen.terminate()
        assert [each.wait(START_S) for each in processes] == [0, 0, 0], logs()


def _pod(
    rendering: Rendering, part: str, environment: Path, model: Path, folder: Path, host: str
) -> list[str]:
    """What starts a part of a release as its pod would, with the model in place of the claim's."""
    spec: dict[str, Any] = rendering.one("Deployment", f"-{part}")["spec"]["template"]["spec"]
    holder = container(spec)
    assert holder["securityContext"]["readOnlyRootFilesystem"]
    volumes = {each["name"]: each for each in spec["volumes"]}
    writable, read_only = [], {str(environment): environment}
    for mount in holder["volumeMounts"]:
        volume, path = volumes[mount["name"]], mount["mountPath"]
        if "emptyDir" in volume:
            writable.append(path)
        elif "configMap" in volume:
            data = rendering.one("ConfigMap", volume["configMap"]["name"])["data"]
            folder.mkdir()
            read_only[path] = folder / mount["subPath"]
            read_only[path].write_text(data[mount["subPath"]])
        else:
            read_only[path] = model
    known = {"status.podIP": host, "metadata.name": part, "spec.nodeName": "node"}
    env = variables(IMAGES[part])
    env["PATH"] = f"{environment}/bin:{os.defpath}"
    for each in holder["env"]:
        match each.get("valueFrom"):
            case None:
                env[each["name"]] = each["value"]
            case {"fieldRef": {"fieldPath": path}}:
                env[each["name"]] = known[path]
            case {"resourceFieldRef": _}:
                env[each["name"]] = "1"
            case _:
                env[each["name"]] = TOKEN
    root = folder / "root"
    root.mkdir()
    user, group = spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]
    pod = Pod(root=root, user=user, group=group, env=env, writable=writable, read_only=read_only)
    return pod.command(*holder["command"], *holder["args"])


def _ready(url: str, processes: list[Process]) -> bool:
    for each in processes:
        assert each.running, f"{each.name} ended:\n{each.log}"
    if http_status(f"{url}/ready") != 200:
        return False
    workers = httpx.get(f"{url}/v1/fleet", trust_env=False).json()["workers"]
    return [each["state"] for each in workers] == ["ready", "ready"]


def _import_all_of_a_router(installed: dict[str, Path]) -> None:
    python = str(installed["router"] / "bin" / "python")
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", EVERY_MODULE], capture_output=True, text=True, env=env, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "router.main" in loaded and not {"torch", "numba", "engine"} & loaded
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, env=env, check=False)
    assert b"No module named 'torch'" in done.stderr
