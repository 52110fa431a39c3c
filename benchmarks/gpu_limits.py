"""What this GPU can do at most: copy memory and multiply matrices, through torch.

    python -m benchmarks.gpu_limits --json FILE

A process of its own, so that its memory is free for what is compared with it.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = 2 << 30
MATRIX_SIZE = 8192
IN_A_ROW = 200
_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"


def elapsed_s(work: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds that `repeats` calls in a row take on the device."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copy_rates(device: str, num_bytes: int, samples: int = 20) -> list[float]:
    """Bytes read + written per second by device-to-device copies."""
    source = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return [2 * num_bytes / elapsed_s(lambda: target.copy_(source), device) for _ in range(samples)]


def product_rates(
    device: str, size: int, in_a_row: int, samples: int = 20
) -> tuple[list[float], float]:
    """FLOP/s of bf16 products of random matrices: single ones, and the mean of many in a row."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    flops = 2 * size**3
    for _ in range(3):
        left @ right
    single = [flops / elapsed_s(lambda: left @ right, device) for _ in range(samples)]
    sustained = flops * in_a_row / elapsed_s(lambda: left @ right, device, in_a_row)
    return single, sustained


def describe(device: str) -> dict[str, Any]:
    """The GPU and its driver."""
    if not device.startswith("cuda"):
        return {"name": platform.machine()}
    found = {"name": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return found
    values = [value.strip() for value in done.stdout.split(",")]
    names = ("name", "driver", "memory", "power_limit", "clock_sm", "clock_memory")
    return found | dict(zip(names, values, strict=True)) if len(values) == len(names) else found


def measure(device: str, *, shrink: int = 1) -> dict[str, Any]:
    """All of it; sizes are divided by `shrink`."""
    copies = copy_rates(device, COPY_BYTES // shrink)
    single, sustained = product_rates(
        device, max(64, MATRIX_SIZE // shrink), max(2, IN_A_ROW // shrink)
    )
    return {
        "gpu": describe(device),
        "copy_bytes_per_s": copies,
        "product_flops_per_s": single,
        "product_in_a_row_flops_per_s": [sustained],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes by this")
    arguments = parser.parse_args()
    result = measure(arguments.device, shrink=arguments.shrink)
    arguments.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
