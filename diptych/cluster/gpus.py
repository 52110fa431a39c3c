"""Which GPU each worker of a local cluster gets, and how much of its memory.

With device `auto` or `cuda` workers take GPUs in turn; with one GPU named, all share that one.
Where there is no GPU nothing is said to workers, and `auto` takes the CPU.
"""

import ctypes
import subprocess
import sys

from core.errors import ConfigError
from diptych.cluster.settings import ServeSettings
from worker.settings import WorkerSettings

_PROBE_TIMEOUT_S = 120.0
_PROBE = "import torch; print(torch.cuda.device_count())"


def visible_gpus() -> int:
    """GPUs that workers' torch can use. Asks torch, in a process of its own, if there is a driver.

    Raises:
        ConfigError: torch can't say.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            check=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
        )
        return int(answer.stdout.split()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip()
        raise ConfigError(
            f"Can't find out how many GPUs torch sees: {detail[-500:]}\n"
            f"See what `{sys.executable} -c '{_PROBE}'` says, or set --device cpu."
        ) from None


def device_of(settings: ServeSettings) -> str:
    """What the user said about workers' devices."""
    return str(_worker_setting(settings, "device"))


def worker_gpus(settings: ServeSettings, num_workers: int, num_gpus: int) -> list[tuple[str, ...]]:
    """Options that place each worker, to follow those that the user gave.

    Raises:
        ConfigError: a worker needs more GPUs than there are.
    """
    device = device_of(settings)
    if device == "cpu" or (device == "auto" and not num_gpus):
        return [()] * num_workers
    per_worker = int(_worker_setting(settings, "tensor_parallel_size"))
    first = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else 0
    if first + per_worker > num_gpus:
        raise ConfigError(
            f"A worker needs {per_worker} of the GPUs from cuda:{first} on, and torch sees "
            f"{num_gpus} in all; change --device or --tensor-parallel-size, or set --device cpu."
        )
    num_places = 1 if device.startswith("cuda:") else num_gpus // per_worker
    share = float(_worker_setting(settings, "gpu_memory_utilization"))
    options: list[tuple[str, ...]] = []
    for index in range(num_workers):
        place = index % num_places
        num_sharers = len(range(place, num_workers, num_places))
        options.append(
            (
                f"--device=cuda:{first + place * per_worker}",
                f"--gpu-memory-utilization={share / num_sharers:.4f}",
            )
        )
    return options


def _worker_setting(settings: ServeSettings, name: str) -> float | int | str:
    value = getattr(settings, name, WorkerSettings.model_fields[name].default)
    assert isinstance(value, (float, int, str))
    return value
