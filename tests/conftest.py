"""What holds for every test run."""

import signal
from types import FrameType


def pytest_configure() -> None:
    """A run that is told to end unwinds, so that the processes which tests started end too."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
