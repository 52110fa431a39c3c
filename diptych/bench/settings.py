"""What a user can say to `diptych bench`."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from core.settings import Seconds
from diptych.bench.arrivals import Lengths
from router.api.slo import SloTargets

_SLO = SloTargets()
_REQUESTS = 100
_CONCURRENCY = 8


def _length(value: object) -> str:
    Lengths.of(str(value))
    return str(value)


LengthText = Annotated[str, BeforeValidator(_length)]


class BenchSettings(BaseModel):
    """Load any OpenAI-compatible endpoint and report throughput, latencies and goodput.

    The load is an open loop (--rate, or a --trace) or a closed one (--concurrency). This measures a
    system that runs already; `make bench` in a checkout measures the code with a system of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field("http://127.0.0.1:8000", description="Where the endpoint is.")
    model: str | None = Field(None, description="Model to ask; default: the first one served.")
    api_key: SecretStr | None = Field(
        None, description="API key, sent as a bearer token; better said in the environment."
    )
    ca: str | None = Field(
        None,
        description="PEM file of the CA that the endpoint's certificate must come from; default: "
        "those that this machine trusts.",
    )
    chat: bool = Field(False, description="Ask for chat completions; otherwise for completions.")
    text: bool = Field(
        False,
        description="Send prompts as text even where the endpoint takes token ids; lengths are "
        "then near what is asked, not exact.",
    )

    rate: float | None = Field(
        None,
        gt=0,
        description="Open loop: requests per second on average, arriving by chance (Poisson), "
        "however many are under way; inf: all at once.",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Closed loop: requests under way at any time; default: "
        f"{_CONCURRENCY} without --rate and --trace.",
    )
    trace: str | None = Field(
        None,
        description="Open loop: file of requests, in the form of Mooncake (JSONL) or Azure (CSV).",
    )
    faster: float = Field(1.0, gt=0, description="Divides the times of the trace.")
    requests: int | None = Field(
        None,
        ge=1,
        description=f"Requests to send; default: {_REQUESTS} without --duration, all of a trace.",
    )
    duration: Seconds | None = Field(None, gt=0, description="How long requests are sent.")
    warmup: int = Field(4, ge=0, description="Requests that are sent first and not counted.")
    prompt_tokens: LengthText = Field(
        "512", description="Length of prompts, or a range to draw from as in 128..1024."
    )
    output_tokens: LengthText = Field("128", description="Length of outputs, likewise.")
    shared_prefix_tokens: int = Field(
        0, ge=0, description="Tokens with which every prompt begins, for a cache to keep."
    )
    seed: int | None = Field(
        None,
        description="Of arrivals, lengths and prompts; default: another one each time, so that no "
        "cache knows the prompts.",
    )
    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token.")
    ignore_eos: bool = Field(
        True, description="Outputs go on to their full length, so that all runs do the same work."
    )
    timeout_s: Seconds = Field(600.0, gt=0, description="Longest time for a whole request.")
    clients: int = Field(4, ge=1, description="Client processes that send and read.")

    slo_ttft_s: Seconds = Field(_SLO.ttft_s, gt=0, description="SLO: time to the first token.")
    slo_tpot_s: Seconds = Field(
        _SLO.tpot_s, gt=0, description="SLO: mean time per output token after the first."
    )
    slo_itl_s: Seconds = Field(
        _SLO.itl_s,
        gt=0,
        description="SLO: gap between two tokens, for 99 in 100 gaps of a request.",
    )

    timelines: int = Field(
        0,
        ge=0,
        description="Ask a Diptych router for the timelines of so many requests, and show where "
        "their time went.",
    )
    json_: str | None = Field(
        None,
        description="File for settings, figures and every request's samples as JSON; - for "
        "standard output.",
    )
    strict: bool = Field(False, description="End with status 1 if any request failed.")

    @property
    def slo(self) -> SloTargets:
        """What a request must meet to count as served well."""
        return SloTargets(ttft_s=self.slo_ttft_s, tpot_s=self.slo_tpot_s, itl_s=self.slo_itl_s)

    @property
    def prompt(self) -> Lengths:
        """Lengths of prompts."""
        return Lengths.of(self.prompt_tokens)

    @property
    def output(self) -> Lengths:
        """Lengths of outputs."""
        return Lengths.of(self.output_tokens)

    @property
    def in_flight(self) -> int:
        """Requests under way in a closed loop; 0: the loop is open."""
        if self.rate is not None or self.trace is not None:
            return 0
        return self.concurrency or _CONCURRENCY

    @property
    def count(self) -> int | None:
        """Requests at most; None: as many as there are until the end."""
        if self.requests is None and self.duration is None and self.trace is None:
            return _REQUESTS
        return self.requests

    @model_validator(mode="after")
    def _one_load(self) -> "BenchSettings":
        loads = [self.rate is not None, self.concurrency is not None, self.trace is not None]
        if sum(loads) > 1:
            raise ValueError("give one of --rate, --concurrency and --trace: each is a load.")
        if self.rate == math.inf and self.duration is not None:
            raise ValueError("--rate inf sends all at once: give --requests, not --duration.")
        if self.faster != 1 and self.trace is None:
            raise ValueError("--faster is about a --trace.")
        if self.trace is not None and self.shared_prefix_tokens:
            raise ValueError("a --trace says itself which prefixes are shared.")
        if self.shared_prefix_tokens > self.prompt.low:
            raise ValueError("--shared-prefix-tokens must not be more than --prompt-tokens.")
        return self
