"""What the nodes of one worker must have in common, and what is wrong if they haven't.

Called in the service process of each node, before anything is loaded. Ranks that differ in any of
it would wait for one another for ever, or compute something else than each other.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from core.modelfile.digest import model_digest
from core.modelfile.resolve import resolve_model
from worker.settings import WorkerSettings

AGREED_SETTINGS = (
    *("load_format", "dtype", "device", "tensor_parallel_size", "nodes"),
    *("block_size", "num_blocks", "kv_cache_memory", "host_kv_memory", "gpu_memory_utilization"),
    *("max_model_len", "max_num_seqs", "max_step_tokens", "max_chunk_tokens", "prefix_caching"),
    *("attention_backend", "cuda_graphs", "grammar_backend", "seed"),
    *("kv_transport", "descriptor_bytes"),
)
"""Everything that shapes what a rank computes, holds or sends. Where the model lies is not among
it: its digest is."""
_SHOWN = 6


def agreed(settings: WorkerSettings, role: str) -> dict[str, str]:
    """What another node must say too, by name. Reads samples of the model's files.

    Raises:
        ConfigError: there is no such model.
    """
    values = settings.model_dump(mode="json", include=set(AGREED_SETTINGS))
    path = resolve_model(settings.model)
    return {
        "role": role,
        "version": _version("diptych"),
        "torch": _version("torch"),
        "model digest": _digest(path, settings).hex(),
        **{name: "not set" if value is None else str(value) for name, value in values.items()},
    }


def differences(ours: Mapping[str, str], theirs: Mapping[str, str], node: int) -> str:
    """What the leader and another node don't agree on, for both; empty if they do.

    Args:
        ours: the leader's.
        theirs: the other's.
        node: which one that is.
    """
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    parts = [
        f"{name} is {_shown(ours, name)} on the leader and {_shown(theirs, name)} on node {node}"
        for name in names[:_SHOWN]
    ]
    if len(names) > _SHOWN:
        parts.append(f"and {len(names) - _SHOWN} more")
    return "; ".join(parts)


def _shown(values: Mapping[str, str], name: str) -> str:
    return values.get(name, "unknown")[:64]


def _digest(path: Path, settings: WorkerSettings) -> bytes:
    dummy = settings.load_format == "dummy"
    return model_digest(path, dummy_seed=settings.seed if dummy else None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
