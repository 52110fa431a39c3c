"""What the facts about the host mean. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from diptych.doctor.finding import Finding, fail, ok, skip, warn
from diptych.doctor.host import HostFacts

MIN_CAPABILITY = (8, 0)
"""Least compute capability that FlashInfer's kernels are built for."""
MIN_SHM_BYTES = 1 << 30
"""NCCL and torch pass tensors of several ranks through it. Source: own judgement; a container
without more has 64 MiB."""
RDMA_TRANSPORTS = ("rc", "dc", "ud", "ib", "all")


def check_host(facts: HostFacts, *, worker: bool) -> Iterator[Finding]:
    """Everything about the host.

    Args:
        facts: of it.
        worker: workers run here; what only they need is checked.
    """
    yield ok("python", f"Python {facts.python}")
    if worker:
        yield check_torch(facts)
        yield check_gpu(facts)
        yield check_flashinfer(facts)
        yield check_nixl(facts)
        yield check_rdma(facts)
        yield check_memlock(facts)
        yield check_shm(facts)
    else:
        yield skip("gpu", "no worker runs here (--role worker looks for GPUs and RDMA)")
    yield from check_ports(facts)
    yield check_model(facts)


def _gpus(facts: HostFacts) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = facts.packages.get("torch", {}).get("gpus", [])
    return found


def check_torch(facts: HostFacts) -> Finding:
    """Torch is there."""
    torch = facts.packages.get("torch", {})
    if "error" in torch:
        return fail(
            "torch",
            f"torch can't be imported: {torch['error']}",
            "Install what workers need: pip install 'diptych[worker]', or use the worker's image.",
        )
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "for CPUs"
    return ok("torch", f"torch {torch['version']} ({build})")


def check_gpu(facts: HostFacts) -> Finding:
    """GPUs are seen, and new enough."""
    torch, gpus = facts.packages.get("torch", {}), _gpus(facts)
    if "error" in torch:
        return skip("gpu", "torch is not there to ask")
    if not gpus and torch["cuda"] and facts.driver:
        return fail(
            "gpu",
            f"there is an NVIDIA driver ({facts.driver}), but torch sees no GPU",
            "Ask for nvidia.com/gpu in the pod's resources; see that CUDA_VISIBLE_DEVICES hides "
            "none, and that the driver is new enough for this CUDA (nvidia-smi).",
        )
    if not gpus and torch["cuda"]:
        return warn(
            "gpu",
            "torch is a build for CUDA, but there is no NVIDIA driver: workers run on the CPU",
            "Run on a node with GPUs (node selector, runtime class nvidia), or set device cpu.",
        )
    if not gpus and facts.driver:
        return warn(
            "gpu",
            f"there is an NVIDIA driver ({facts.driver}), but torch is a build for CPUs",
            "Install a torch with CUDA.",
        )
    if not gpus:
        return ok("gpu", "no GPU: workers run on the CPU")
    names = ", ".join(f"{gpu['name']} ({_dotted(gpu['capability'])})" for gpu in gpus)
    old = [gpu for gpu in gpus if tuple(gpu["capability"]) < MIN_CAPABILITY]
    if old:
        return warn(
            "gpu",
            f"{names}: below compute capability {_dotted(MIN_CAPABILITY)}, FlashInfer has no "
            "kernels",
            "Set attention_backend torch_native, or use newer GPUs.",
        )
    return ok("gpu", f"{names}, driver {facts.driver or 'unknown'}")


def check_flashinfer(facts: HostFacts) -> Finding:
    """The attention kernels of GPUs are there."""
    package = facts.packages.get("flashinfer", {})
    if not _gpus(facts):
        return skip("flashinfer", "only GPUs need it")
    if "error" in package:
        return warn(
            "flashinfer",
            f"flashinfer can't be imported ({package['error']}): attention is slow",
            "pip install 'diptych[gpu]'.",
        )
    return ok("flashinfer", f"flashinfer {package['version']}")


def check_nixl(facts: HostFacts) -> Finding:
    """KV can move one-sidedly."""
    package = facts.packages.get("nixl", {})
    if "error" in package:
        return warn(
            "nixl",
            f"NIXL can't be imported ({package['error']}): KV moves by tcp",
            "pip install 'diptych[nixl]' ('diptych[nixl-cu13]' with CUDA 13).",
        )
    parts = ", ".join(facts.transports) or "unknown"
    return ok("nixl", f"NIXL {package['version']}; UCX transports: {parts}")


def check_rdma(facts: HostFacts) -> Finding:
    """RDMA devices are there, up, and not ruled out."""
    if not facts.rdma:
        return warn(
            "rdma",
            "no RDMA device: KV of workers on other hosts moves over TCP",
            "If the node has one, ask for it in the pod's resources (such as rdma/ib: 1); without "
            "one, keep prefill and decode of small models together (--local-prefill-max-tokens).",
        )
    shown = ", ".join(f"{name} {state}" for name, state in facts.rdma.items())
    if "ACTIVE" not in facts.rdma.values():
        return fail(
            "rdma", f"no RDMA port is active: {shown}", "Look at cables, switch and ibstat."
        )
    allowed = facts.ucx_tls.split(",") if facts.ucx_tls else []
    negated = facts.ucx_tls.startswith("^")
    if allowed and not negated and not any(each.startswith(RDMA_TRANSPORTS) for each in allowed):
        return fail(
            "rdma",
            f"UCX_TLS={facts.ucx_tls} leaves RDMA out",
            "Unset UCX_TLS, or add rc to it.",
        )
    return ok("rdma", shown)


def check_memlock(facts: HostFacts) -> Finding:
    """RDMA may pin the KV pool."""
    limit = facts.memlock_bytes
    shown = "unlimited" if limit is None else f"{limit >> 10} KiB"
    if facts.rdma and limit is not None:
        return fail(
            "memlock",
            f"at most {shown} of memory may be pinned, and RDMA pins the whole KV pool",
            "Give the container the capability IPC_LOCK and an unlimited memlock (ulimit -l).",
        )
    return ok("memlock", f"{shown} may be pinned")


def check_shm(facts: HostFacts) -> Finding:
    """Ranks can pass tensors."""
    shown = f"/dev/shm has {facts.shm_bytes / (1 << 20):.0f} MiB"
    if facts.shm_bytes < MIN_SHM_BYTES:
        return warn(
            "shm",
            f"{shown}: tensor parallelism over several GPUs may fail",
            "Mount an emptyDir with medium: Memory at /dev/shm (docker: --shm-size 8g).",
        )
    return ok("shm", shown)


def check_ports(facts: HostFacts) -> Iterator[Finding]:
    """What is to listen here can."""
    for port, reason in facts.ports.items():
        if reason:
            yield fail(
                f"port {port}",
                f"port {port} can't be listened on: {reason}",
                "Stop what uses it (ss -ltnp shows it), or choose another port.",
            )
        else:
            yield ok(f"port {port}", f"port {port} is free")


def check_model(facts: HostFacts) -> Finding:
    """The model's files can be read."""
    if not facts.model:
        return skip("model", "no model is named (--model)")
    if facts.model_error:
        return fail(
            "model",
            facts.model_error,
            "See that the volume is mounted at that path and its files can be read by this user.",
        )
    return ok(
        "model", f"{facts.model} can be read (digest {facts.model_digest[:8] or 'not taken'})"
    )


def _dotted(numbers: tuple[int, ...] | list[int]) -> str:
    return ".".join(map(str, numbers))
