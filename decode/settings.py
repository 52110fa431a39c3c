"""What a user can set on a decode worker."""

from pydantic import Field

from core.settings import ByteSize, Seconds
from worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """Settings of a decode worker."""

    port: int = Field(9002, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    peer_silence_s: Seconds = Field(
        8.0, gt=0, description="Seconds without an answer before a prefill worker is given up."
    )
    max_inflight_bytes: ByteSize = Field(
        ByteSize(256 << 20),
        ge=1,
        description="Bytes of KV that may be on their way from one prefill worker.",
    )
    probe_bytes: ByteSize = Field(
        ByteSize(32 << 20),
        ge=0,
        description="Bytes read to measure the link to a prefill worker while it is unused; 0: "
        "links are measured by the KV of prompts alone.",
    )
    probe_interval_s: Seconds = Field(
        300.0, gt=0, description="Least time between two such measurements of one link."
    )
