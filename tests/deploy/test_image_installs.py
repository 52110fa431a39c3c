"""What images hold: installed by the steps of their Dockerfile, run as the chart's pods run."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml

from scripts.install_image import CONSTRAINTS, CUDA_CONSTRAINTS
from scripts.lock_cuda import NoAnswer, pinned, resolve
from tests.support.cluster import START_S
from tests.support.helm import Manifest, Rendering, container, render, settings_of
from tests.support.images import ROOT, sent_to_builders
from tests.support.pods import Pod, skip_without_rights
from tests.support.process import Process, http_status, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEP_S = 300
EVERY_MODULE = """
import importlib, pkgutil, sys
for name in ("core", "telemetry", "rpc", "router"):
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(module.name)
print(*sorted(sys.modules))
"""


@pytest.fixture(scope="module")
def cuda_resolution() -> dict[str, str]:
    try:
        return resolve(CONSTRAINTS, CUDA_CONSTRAINTS)
    except NoAnswer as unavailable:
        pytest.skip(f"no package index can be reached: {unavailable}")


@pytest.fixture(scope="module")
def installed(
    cuda_resolution: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Environments by image. Sources are those that a builder would be sent."""
    folder = tmp_path_factory.mktemp("images")
    source = folder / "source"
    sent_to_builders(source)
    environments = {image: folder / image for image in ("router", "worker-cpu")}
    for image, environment in environments.items():
        _step(source, "dependencies", image, str(environment))
        product = folder / f"product-{image}"
        _step(source, "product", image, str(environment), "--to", str(product))
        shutil.copytree(product, environment, dirs_exist_ok=True)
        _step(source, "check", image, str(environment))
    yield environments
    shutil.rmtree(folder)


def _step(source: Path, *words: str) -> None:
    # Byte code would be compiled again for another interpreter; here it would only take time.
    env = {**os.environ, "PIP_NO_COMPILE": "1", "PYTHONPATH": ""}
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


def test_all_of_a_router_works_without_torch(installed: dict[str, Path]) -> None:
    python = str(installed["router"] / "bin" / "python")
    done = subprocess.run(
        [python, "-c", EVERY_MODULE], capture_output=True, text=True, cwd="/", check=True
    )
    assert not {"torch", "numba", "engine"} & set(done.stdout.split())


def test_pods_serve_with_nothing_writable_but_their_volumes(
    installed: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    skip_without_rights()
    rendering = render({"model": {"source": "pvc", "pvc": {"claimName": "m"}}}, profile="cpu")
    hosts = dict(
        zip(
            ("router", "prefill", "decode"),
            (f"127.{random.randint(64, 250)}.8.{n}" for n in range(2, 5)),
            strict=True,
        )
    )
    more = {part: [f"--host={host}"] for part, host in hosts.items()}
    more["router"] += ["--discovery=static", f"--prefill={hosts['prefill']}:9001"]
    more["router"] += [f"--decode={hosts['decode']}:9001"]
    small = {"kv_cache_memory": "64MiB", "model": str(tiny_llama)}
    with ExitStack() as stack:
        processes: list[Process] = []
        for part, host in hosts.items():
            environment = installed["router" if part == "router" else "worker-cpu"]
            pod, command = _pod(rendering, part, environment, tiny_llama, tmp_path)
            words = [*command, *more[part]]
            del host, small
            processes.append(stack.enter_context(running(pod.command(*words), name=part)))
