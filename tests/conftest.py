"""What holds for every test run, in each of its processes."""

import os
import signal
from types import FrameType

# Read when OpenMP starts. Tests share the cores with each other and with the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import torch

# A slow example says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile("diptych", deadline=None)
hypothesis.settings.load_profile("diptych")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when kernels are defined, so it must be set before any test imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """A run that is told to end unwinds, so that the processes which tests started end too."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
