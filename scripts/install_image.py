"""Install what one of our images holds: `python scripts/install_image.py STEP IMAGE [FOLDER]`.

Every RUN of deploy/images/Dockerfile is one of these steps, and tests run the same ones in an empty
folder, so that they are exercised where no image can be built. Only the standard library is needed.
Each version comes from constraints.txt, for CUDA from constraints-cuda.txt too.

Dependencies and product go to separate folders, whose files lie side by side in the end: a layer of
gigabytes that seldom changes below one of a few megabytes that changes with every commit.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREFIX = Path("/opt/diptych")
"""Where an image has its environment. It is made there: programs name their interpreter by path."""
CONSTRAINTS = ROOT / "constraints.txt"
CUDA_CONSTRAINTS = ROOT / "deploy" / "images" / "constraints-cuda.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What an image is made of, beside its base."""

    extras: tuple[str, ...]
    """Of pyproject.toml."""
    debian: tuple[str, ...] = ()
    """Packages of the base's distribution."""
    commands: tuple[str, ...]
    """What `diptych` must be able to do in it."""
    absent: tuple[str, ...] = ()
    """Modules that must not have come along."""
    cuda: bool = False


IMAGES = {
    "router": Image(
        extras=("router", "k8s", "tracing"),
        commands=("router", "doctor"),
        absent=("torch", "numba", "flashinfer"),
    ),
    "worker-cpu": Image(
        extras=("worker", "nixl", "doctor"),
        # Compiled steps run on OpenMP's threads, which engine/threads.py tunes; torch has its own.
        debian=("libgomp1",),
        commands=("prefill", "decode", "doctor"),
        absent=("flashinfer",),
    ),
    "worker": Image(
        extras=("worker", "gpu", "nixl-cu13", "nvcc", "doctor"),
        # FlashInfer's kernels and triton's launchers are compiled when they are first needed.
        debian=("g++",),
        commands=("prefill", "decode", "doctor"),
        cuda=True,
    ),
}


def requirements(image: Image) -> list[str]:
    """What pip is asked for: all that pyproject.toml names for the image, without our own code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    found = [
        *project["dependencies"],
        *(each for extra in image.extras for each in optional[extra]),
    ]
    return sorted(set(found))


def install_system(image: Image) -> None:
    """Install packages of the distribution; needs root."""
    if not image.debian:
        return
    _run("apt-get", "update")
    _run("apt-get", "install", "--yes", "--no-install-recommends", *image.debian)
    _run("apt-get", "clean")
    shutil.rmtree("/var/lib/apt/lists")


def install_dependencies(image: Image, folder: Path) -> None:
    """Make an environment with everything but our own code."""
    _run(sys.executable, "-m", "venv", str(folder))
    files = [CONSTRAINTS, *([CUDA_CONSTRAINTS] if image.cuda else [])]
    pip = [*_pip(folder), *(word for file in files for word in ("--constraint", str(file)))]
    # What venv brings along is as old as the interpreter.
    _run(*pip, "pip", "setuptools")
    wanted = requirements(image)
    if any(each.startswith("torch") for each in wanted):
        # Alone, from where TORCH_PIP_ARGS point: the build without CUDA is on an index of its own,
        # which must not be asked for anything else.
        source = shlex.split(os.environ.get("TORCH_PIP_ARGS", ""))
        _run(*pip, "--no-deps", *source, "torch")
    _run(*pip, *wanted)
    if image.cuda:
        complete_toolkit(folder)


def install_product(image: Image, environment: Path, folder: Path) -> None:
    """Install our own code for an environment, but into another folder."""
    build = ("--build-constraint", str(CONSTRAINTS))
    _run(*_pip(environment), "--no-deps", *build, "--prefix", str(folder), str(ROOT))


def check(image: Image, folder: Path) -> None:
    """See that each command starts and judges settings, and that nothing superfluous came along.

    Raises:
        SystemExit: something is missing or superfluous.
    """
    binaries = folder / "bin"
    _run(str(binaries / "diptych"), "--version")
    _run(str(binaries / "hf"), "version")
    for command in image.commands:
        _run(str(binaries / "diptych"), command, "--check")
    code = "import importlib.util, sys; sys.exit(bool(importlib.util.find_spec(sys.argv[1])))"
    for module in image.absent:
        if subprocess.run([str(binaries / "python"), "-c", code, module], check=False).returncode:
            raise SystemExit(f"{module} is installed and must not be.")
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    sys.stdout.write(f"{folder} has {size / 1e9:.2f} GB.\n")


def complete_toolkit(folder: Path) -> None:
    """Lay out the wheels' toolkit as builds expect one: with lib64, libcudart.so and libcuda.so.

    The last one is a stub without symbols. Programs that link it find the driver's own, which the
    container runtime brings, when they are loaded.
    """
    (toolkit,) = folder.glob("lib/python3.*/site-packages/nvidia/cu13")
    (toolkit / "lib64").symlink_to("lib")
    (runtime,) = (toolkit / "lib").glob("libcudart.so.*")
    runtime.with_name("libcudart.so").symlink_to(runtime.name)
    stub = toolkit / "lib" / "stubs" / "libcuda.so"
    stub.parent.mkdir()
    link = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub))
    _run("gcc", *link, "-x", "c", os.devnull)


def _pip(environment: Path) -> list[str]:
    python = str(environment / "bin" / "python")
    return [python, "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]


def _run(*command: str) -> None:
    sys.stdout.write(f"+ {shlex.join(command)}\n")
    sys.stdout.flush()
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with status {done.returncode}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description="Install one of Diptych's images.")
    parser.add_argument("step", choices=("system", "dependencies", "product", "check"))
    parser.add_argument("image", choices=sorted(IMAGES))
    parser.add_argument(
        "folder", nargs="?", type=Path, default=PREFIX, help=f"the environment; {PREFIX}"
    )
    parser.add_argument("--to", type=Path, help="where the step `product` puts its files")
    given = parser.parse_args(argv)
    image = IMAGES[given.image]
    match given.step:
        case "system":
            install_system(image)
        case "dependencies":
            install_dependencies(image, given.folder)
        case "product":
            install_product(image, given.folder, given.to or given.folder)
        case _:
            check(image, given.folder)


if __name__ == "__main__":
    main()
