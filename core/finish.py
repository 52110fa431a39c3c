"""How a request can end."""

from enum import StrEnum


class FinishReason(StrEnum):
    """The one terminal status of a request on a worker; a cause travels with FAILED."""

    STOP = "stop"
    """An end-of-sequence or stop id was sampled."""
    LENGTH = "length"
    """max_tokens or the model's context length was reached."""
    ABORTED = "aborted"
    """Whoever submitted it took it back."""
    FAILED = "failed"
    HANDED_OVER = "handed_over"
    """Prefill's part is done; decode goes on."""
