"""What a user can set on a prefill worker."""

from pydantic import Field

from core.settings import Seconds
from worker.settings import WorkerSettings


class PrefillSettings(WorkerSettings):
    """Settings of a prefill worker."""

    lease_ttl_s: Seconds = Field(
        15.0,
        gt=0,
        description="Seconds that exported KV outlives the last sign of life of its decode worker.",
    )
