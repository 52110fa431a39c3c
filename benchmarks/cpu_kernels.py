"""What decides a step's time on a CPU: the format of weights, and how threads wait.

    python benchmarks/cpu_kernels.py formats --threads 2
    python benchmarks/cpu_kernels.py spin --threads 2

`formats` times all matrices of one step of SmolLM2-135M, in order, per number of rows and format;
GB/s is weight bytes over time. `spin` times a decode step's matrices per GOMP_SPINCOUNT, alone
and with two processes at once. Medians; compare figures only within one run on an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.threads import compute_thread_env

if TYPE_CHECKING:
    import torch

    from engine.layers.linear import Linear

LAYERS = 30
LAYER_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
HEAD_SHAPE = (49152, 576)
SPIN_COUNTS = (0, 1000, 3000, 10_000, 30_000, 100_000)
_READY = "DIPTYCH_BENCHMARK_ENV_SET"


def median_ms(run: Callable[[], object], seconds: float = 1.5) -> float:
    """Median milliseconds of `run` over about that many seconds, at least five runs."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def run_all(
    layers: "Sequence[tuple[Linear, tuple[int, int]]]",
    inputs: "dict[int, torch.Tensor]",
    between: int = 0,
) -> None:
    """Apply each layer to the input of its size, with small operations after each."""
    for layer, (_, size) in layers:
        layer(inputs[size])
        for _ in range(between):  # stands in for norms, RoPE and the like
            inputs[576].mul_(1.0)


def formats() -> None:
    """Print one row per number of rows, one column per format."""
    import torch

    from engine.layers.linear import Linear

    shapes = [*LAYER_SHAPES * LAYERS, HEAD_SHAPE]
    weights = [torch.randn(shape) * 0.02 for shape in shapes]
    columns = {
        "row-major": [Linear(w) for w in weights],
        "both": [Linear(w, pack=True) for w in weights],
    }
    num_bytes = sum(w.numel() * 4 for w in weights)
    print(f"{num_bytes / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads")
    for rows in (1, 2, 3, 4, 8, 16, 32, 64, 128, 512):
        inputs = {size: torch.randn(rows, size) for size in (576, 1536)}
        cells = []
        for name, layers in columns.items():
            # The LM head sees one row per sequence, never a whole prompt.
            used = list(zip(layers, shapes, strict=True))[: None if rows < 512 else -1]

            ms = median_ms(partial(run_all, used, inputs))
            cells.append(f"{name} {ms:7.1f} ms {num_bytes / ms / 1e6:5.1f} GB/s")
        print(f"rows {rows:4d}   " + "   ".join(cells), flush=True)


def spin_one() -> None:
    """Print medians for one and eight rows as JSON; `spin` runs this in processes of its own."""
    import torch

    from engine.layers.linear import Linear

    shapes = [*LAYER_SHAPES * LAYERS, HEAD_SHAPE]
    layers = [Linear(torch.randn(shape) * 0.02, pack=True) for shape in shapes]
    result = {}
    for rows in (1, 8):
        inputs = {size: torch.randn(rows, size) for size in (576, 1536)}
        used = list(zip(layers, shapes, strict=True))
        result[rows] = median_ms(partial(run_all, used, inputs, between=6), 3.0)
    print(json.dumps(result))


def spin(threads: int) -> None:
    """Print step times per spin count, alone and two processes at once."""
    command = [sys.executable, __file__, "spin-one", "--threads", str(threads)]
    for count in SPIN_COUNTS:
        env = {
            **os.environ,
            **compute_thread_env(threads),
            "GOMP_SPINCOUNT": str(count),
            _READY: "1",
        }
        cells = []
        for copies in (1, 2):
            started = [
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
                for _ in range(copies)
            ]
            results = [json.loads(process.communicate(timeout=120)[0]) for process in started]
            for rows in ("1", "8"):
                mean = statistics.mean(result[rows] for result in results)
                cells.append(f"{copies} at once, {rows} rows {mean:6.1f} ms")
        print(f"GOMP_SPINCOUNT {count:6d}   " + "   ".join(cells), flush=True)


def main() -> None:
    """Put the engine's own environment in force, then run one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("formats", "spin", "spin-one"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if _READY not in os.environ:
        os.environ.update(compute_thread_env(arguments.threads), **{_READY: "1"})
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if arguments.what == "spin":
        spin(arguments.threads)
        return
    import torch

    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        {"formats": formats, "spin-one": spin_one}[arguments.what]()


if __name__ == "__main__":
    main()
