"""Imports one package in a process of its own and prints what it says of itself, as JSON.

Started by host.py with `python -m diptych.doctor.probe NAME`: a library that hangs or crashes while
it loads its drivers must not take the doctor with it.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

DISTRIBUTIONS = {
    "flashinfer": ("flashinfer-python",),
    "nixl": ("nixl-cu12", "nixl-cu13"),
    "torch": ("torch",),
}
MODULES = {
    "flashinfer": ("flashinfer",),
    "nixl": ("nixl_cu12._api", "nixl_cu13._api"),
    "torch": ("torch",),
}


def look(name: str) -> dict[str, Any]:
    """Version of a package, and of torch its devices; or why it can't be imported."""
    reasons = []
    for module, distribution in zip(MODULES[name], DISTRIBUTIONS[name], strict=True):
        try:
            imported = importlib.import_module(module)
        except Exception as error:
            reasons.append(f"{module}: {error}")
            continue
        found: dict[str, Any] = {"version": _version(distribution)}
        return found | (_torch(imported) if name == "torch" else {})
    return {"error": "; ".join(reasons)}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _torch(torch: Any) -> dict[str, Any]:
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": about.name,
                    "capability": [about.major, about.minor],
                    "memory_bytes": about.total_memory,
                }
            )
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def main(argv: Sequence[str]) -> None:
    """Print about the package that is named."""
    print(json.dumps(look(argv[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
