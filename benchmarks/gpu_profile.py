"""What a GPU did between two moments: kernels of a profile, told apart by kind, and the gaps.

Pure but for `record`. Times are microseconds. Kernels that start before the one before them has
ended (programmatic dependent launch) share its time: every moment counts once, for the kernel that
came first, and a moment is idle only if no kernel had started and not yet ended.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

STEP_BEGINS = "_resolve"
"""The kernel with which every step of the GPU runner begins; see engine.cuda.kernels.tokens."""
IDLE = "idle"
_KINDS = (
    ("copies", r"memcpy|memset"),
    ("attention", r"attention|attend|prefillwith|decodewith|mergestate|variablelengthmerge"),
    ("sampling", r"_chunk_stats|_pick|_sum_above|_nucleus|_bound|_collect|_floor|_descend|argmax"),
    ("products", r"few_rows|gemv|gemm|nvjet|cutlass|cublas|splitk|matmul|\bmm\b|linear"),
)
KINDS = (*(kind for kind, _ in _KINDS), "norms and other", IDLE)


class Kernel(NamedTuple):
    """One thing that the device did."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How a window of time was spent. Its parts sum to the window."""

    window: float
    idle: float
    kinds: dict[str, float]
    """By kind, without idle."""
    kernels: dict[str, float]
    """By name."""
    counts: dict[str, int]
    """Launches by name."""

    @property
    def idle_share(self) -> float:
        """In 0..1."""
        return self.idle / self.window


def record(work: Callable[[], object], device: str) -> list[Kernel]:
    """Run `work` under torch's profiler: what the device did, in order of time."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
    kernels = [
        Kernel(short_name(event.name), event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == activity.name
    ]
    return sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))


def short_name(name: str) -> str:
    """A kernel's name without return type, template and parameters."""
    return re.split(r"[<(]", name.removeprefix("void "), maxsplit=1)[0].strip()[:80]


def kind_of(name: str) -> str:
    """One of KINDS."""
    lowered = name.lower()
    return next((kind for kind, words in _KINDS if re.search(words, lowered)), KINDS[-2])


def step_starts(kernels: Sequence[Kernel], num_steps: int) -> list[float]:
    """When each step began on the device.

    Where nothing is called STEP_BEGINS, the first kernel that ran once per step stands for it.
    """
    counts = Counter(kernel.name for kernel in kernels)
    marker = STEP_BEGINS
    if marker not in counts:
        once = (name for name, count in counts.items() if abs(count - num_steps) <= 1)
        marker = next(once, STEP_BEGINS)
    return [kernel.start for kernel in kernels if kernel.name == marker]


def coverage(kernels: Sequence[Kernel], begin: float, end: float) -> Coverage:
    """Spend the window [begin, end) on the kernels (in order of start) and on idleness."""
    assert begin < end, "an empty window"
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    counts: dict[str, int] = {}
    idle, reached = 0.0, begin
    for kernel in kernels:
        start, stop = max(kernel.start, begin), min(kernel.end, end)
        if start >= end or stop <= begin:
            continue
        if kernel.start >= begin:
            counts[kernel.name] = counts.get(kernel.name, 0) + 1
        idle += max(0.0, start - reached)
        used = max(0.0, stop - max(start, reached))
        kind = kind_of(kernel.name)
        kinds[kind] = kinds.get(kind, 0.0) + used
        names[kernel.name] = names.get(kernel.name, 0.0) + used
        reached = max(reached, stop)
    idle += max(0.0, end - reached)
    return Coverage(window=end - begin, idle=idle, kinds=kinds, kernels=names, counts=counts)


def summary(kernels: Sequence[Kernel], num_steps: int) -> dict[str, Any]:
    """A profile of about `num_steps` steps in numbers per step, and two of them in full.

    The first quarter of the steps is left out: the profiler itself is starting up then. Length and
    idle share are those of the median step, since now and then the profiler holds one up for a
    hundred milliseconds to empty its buffers.

    Raises:
        ValueError: too few steps to say anything.
    """
    starts = step_starts(kernels, num_steps)
    starts = starts[len(starts) // 4 :]
    if len(starts) < 4:
        raise ValueError(f"{len(starts)} steps were told apart among {len(kernels)} kernels.")
    num_steps = len(starts) - 1
    steady = coverage(kernels, starts[0], starts[-1])
    middle = num_steps // 2
    longest = sorted(steady.kernels.items(), key=lambda item: -item[1])[:20]
    lengths = [later - start for start, later in pairwise(starts)]
    idle_shares = [coverage(kernels, *step).idle_share for step in pairwise(starts)]
    return {
        "steps": num_steps,
        "step_us": median(lengths),
        "steps_us": lengths,
        "idle_share": median(idle_shares),
        "idle_shares": idle_shares,
        "kinds_us": {kind: used / num_steps for kind, used in steady.kinds.items()},
        "kernels": {
            name: {"us": used / num_steps, "launches": steady.counts.get(name, 0) / num_steps}
            for name, used in longest
        },
        "timeline": pack(kernels, starts[middle - 1], starts[middle + 1], starts[middle]),
    }


def pack(kernels: Iterable[Kernel], begin: float, end: float, boundary: float) -> dict[str, Any]:
    """The kernels that start in a window, one short line per name: `start+duration` of each."""
    lines: dict[str, list[str]] = {}
    for kernel in kernels:
        if begin <= kernel.start < end:
            text = f"{kernel.start - begin:.2f}+{kernel.end - kernel.start:.2f}"
            lines.setdefault(kernel.name, []).append(text)
    return {
        "window_us": round(end - begin, 2),
        "step_begins_us": round(boundary - begin, 2),
        "kernels": {name: " ".join(line) for name, line in lines.items()},
    }


def unpack(timeline: dict[str, Any]) -> list[Kernel]:
    """The inverse of `pack`, from time 0."""
    kernels = []
    for name, line in timeline["kernels"].items():
        for text in line.split():
            start, duration = map(float, text.split("+"))
            kernels.append(Kernel(name, start, start + duration))
    return sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))
