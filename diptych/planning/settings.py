"""What a user can say to `diptych plan`."""

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from core.settings import Seconds


class PlanSettings(BaseModel):
    """How many prefill and decode replicas meet an SLO under a load.

    The load is a trace, what a running system sees (Prometheus or a router), or plain numbers.
    What a replica can do is measured by the running system, or given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trace: str | None = Field(
        None, description="Load: file of requests, in the form of Mooncake (JSONL) or Azure (CSV)."
    )
    speed: float = Field(
        1.0, gt=0, description="Seconds of the trace, or of what was measured, in one second."
    )
    prometheus: str | None = Field(
        None, description="Load and replicas: URL of a Prometheus that scrapes the system."
    )
    window_s: Seconds = Field(
        3600.0, ge=300, description="Past whose busiest five minutes are read of Prometheus."
    )
    router: str | None = Field(None, description="Load and replicas: URL of a router.")
    api_key: SecretStr | None = Field(
        None, description="Key for the router, if it asks for one; it must be an administrator's."
    )
    watch_s: Seconds = Field(30.0, gt=0, description="How long a router is watched.")
    rate: float | None = Field(None, gt=0, description="Load: requests per second.")
    prompt_tokens: float | None = Field(None, ge=1, description="Load: mean length of prompts.")
    output_tokens: float | None = Field(None, ge=1, description="Load: mean length of outputs.")
    spread: float = Field(
        1.0,
        ge=0,
        description="Standard deviation of lengths over their mean, where no trace says them.",
    )

    ttft_s: Seconds = Field(2.0, gt=0, description="SLO: time to first token.")
    tpot_s: Seconds = Field(
        0.05, gt=0, description="SLO: mean time per output token after the first."
    )
    share: float = Field(
        0.95, gt=0, lt=1, description="SLO: share of the requests that must meet both."
    )
    headroom: float = Field(0.2, ge=0, description="Share of load more than there is to plan for.")

    prefill_tokens_per_s: float | None = Field(
        None, gt=0, description="Prompt tokens that a prefill replica computes per second."
    )
    decode_step_s: Seconds | None = Field(
        None, gt=0, description="Step of a decode replica with one sequence."
    )
    decode_step_full_s: Seconds | None = Field(
        None, gt=0, description="The same with a full batch; default: twice that of one sequence."
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description="Most sequences in a decode batch; default: as measured, else 256."
    )
    kv_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of KV that a decode replica holds; default: as measured, else enough.",
    )
    kv_bytes_per_token: float | None = Field(
        None, ge=0, description="Bytes of KV of one token; default: as measured, else 131072."
    )
    link_bytes_per_s: float | None = Field(
        None,
        gt=0,
        description="Speed at which KV moves to a decode replica; default: as measured, else 2e10.",
    )
    hit_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of prompt tokens that prefix caches spare; default: what the trace's "
        "prefixes make of it, or as measured, else 0.",
    )
    cache_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens that the caches of a prefill replica hold, in all tiers, for a trace "
        "with prefixes; default: all.",
    )

    prefill_gpus: float = Field(1.0, gt=0, description="What a prefill replica costs.")
    decode_gpus: float = Field(1.0, gt=0, description="What a decode replica costs.")
    max_replicas: int = Field(512, ge=1, le=4096, description="Largest pool to think of.")
    json_: bool = Field(False, description="Print JSON.")

    @model_validator(mode="after")
    def _one_load(self) -> "PlanSettings":
        numbers = (self.rate, self.prompt_tokens, self.output_tokens)
        sources = [self.trace, self.prometheus, self.router]
        if self.trace is not None and (self.prometheus or self.router):
            sources.remove(self.trace)  # the trace is the load, the system says what replicas do
        given = sum(source is not None for source in sources) + any(numbers)
        if given > 1:
            raise ValueError(
                "give one load: trace, prometheus, router, or rate with prompt_tokens and "
                "output_tokens (a trace may stand beside prometheus or router)"
            )
        if any(numbers) and not all(numbers):
            raise ValueError("rate, prompt_tokens and output_tokens go together")
        if not given:
            raise ValueError(
                "give a load: --trace FILE, --prometheus URL, --router URL, or --rate with "
                "--prompt-tokens and --output-tokens"
            )
        return self
