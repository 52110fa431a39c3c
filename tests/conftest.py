"""What holds for every test run."""

import os
import signal
from types import FrameType

import torch

if not torch.cuda.is_available():
    # Read when kernels are defined, so it must be set before any test imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """A run that is told to end unwinds, so that the processes which tests started end too."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
