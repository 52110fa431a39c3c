"""A point in a device's queue that the host can wait for."""

import torch


class QueuePoint:
    """Recorded again and again. On a CPU, which has no queue, it has always been reached."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """Mark the end of what is queued now."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Block until the last mark was passed; at once if there is none."""
        if self._event is not None:
            self._event.synchronize()
