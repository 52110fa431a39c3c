"""Compute threads and memory settings of an engine process. Imports torch only when applied.

Whoever starts an engine process puts `compute_thread_env` into its environment, because OpenMP and
malloc read theirs once, at start; the engine calls `apply_num_threads` before it loads a model.
"""

import os

from engine.config import EngineConfig

_SPIN_COUNT = 10_000
"""How often a thread that waits for the others looks before it sleeps: some tens of microseconds.

Between two operations the wait is shorter than that, so nobody sleeps; a thread whose partner
lost its core sleeps soon instead of burning the core that the partner needs. Measured on 2 cores
with SmolLM2's matrices (benchmarks/cpu_kernels.py): alone, a decode step takes 23 ms, as with
endless spinning, but 34 ms without any; two such processes at once take 71 ms each, against
124 ms at 30 000.
"""

_MMAP_THRESHOLD_BYTES = 1 << 28
_TRIM_THRESHOLD_BYTES = 1 << 29


def compute_thread_env(num_threads: int) -> dict[str, str]:
    """Environment for a process that computes with `num_threads` threads.

    Activations of a prompt chunk are larger than malloc's default limit for handing memory back to
    the kernel; with the limits raised their pages are reused instead of being mapped anew in
    every operation, which made small operations on 512 tokens up to ten times faster. Huge pages
    for malloc'd memory, thus for weights, made a decode step of 8 sequences a tenth faster.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": str(_SPIN_COUNT if num_threads > 1 else 0),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_TRIM_THRESHOLD_BYTES),
    }


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def rank_threads(config: EngineConfig) -> int | None:
    """Compute threads of each rank; None: all cores, for there is only one rank on its host."""
    if config.ranks_per_node == 1:
        return config.num_threads
    return max(1, (config.num_threads or available_cores()) // config.ranks_per_node)


def apply_num_threads(num_threads: int | None) -> int:
    """Make torch compute with that many threads; None takes every available core.

    Returns:
        The number in force.
    """
    import torch

    count = num_threads or available_cores()
    torch.set_num_threads(count)
    return count
