"""What a user can set on `diptych autoscale`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from core.settings import Seconds
from diptych.autoscale.policy import Pace
from diptych.autoscale.scale_api import Target
from diptych.autoscale.signals import Targets


def _a_target(text: str) -> str:
    Target.parse(text)
    return text


Scaled = Annotated[str, AfterValidator(_a_target)]
"""kind/name of what runs a pool."""


class AutoscaleSettings(BaseModel):
    """Scale a prefill and a decode pool of Kubernetes to what routers say of them.

    Run one of it. A second one does no harm, as neither overrules a change that it has not seen,
    but it does no good either.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    router: str = Field(
        "http://127.0.0.1:8000",
        description="URL where routers show /metrics; each address of a headless Service's name "
        "is asked.",
    )
    api_key: SecretStr | None = Field(
        None, description="Key for the routers' /metrics, if they ask for one."
    )
    prometheus: str | None = Field(
        None, description="URL of a Prometheus to ask instead; it must scrape routers and workers."
    )
    prometheus_match: str = Field(
        "",
        description="Labels that only this deployment's metrics have there, as in "
        'namespace="llm".',
    )
    prefill: Scaled | None = Field(
        None,
        description="deployment/NAME, statefulset/NAME or leaderworkerset/NAME of the prefill "
        "pool; none: not scaled.",
    )
    decode: Scaled | None = Field(None, description="The same of the decode pool.")
    namespace: str | None = Field(None, description="Of both; default: this pod's own.")
    dry_run: bool = Field(False, description="Say what would be done, and change nothing.")

    prefill_min: int = Field(1, ge=1, description="Fewest prefill replicas.")
    prefill_max: int = Field(8, ge=1, description="Most prefill replicas.")
    decode_min: int = Field(1, ge=1, description="Fewest decode replicas.")
    decode_max: int = Field(8, ge=1, description="Most decode replicas.")

    backlog_s: Seconds = Field(
        0.5, gt=0, description="Seconds of prompts per prefill worker; a quarter of the TTFT."
    )
    busy: float = Field(
        0.7, gt=0, le=1, description="Share of the time that prefill workers should compute."
    )
    kv: float = Field(0.75, gt=0, le=1, description="Share of KV that decode should hold.")
    batch: float = Field(
        0.8, gt=0, le=1, description="Share of the places in decode batches that should be taken."
    )
    itl_s: Seconds = Field(
        0.05, gt=0, description="Gap between tokens that 95 % should stay within: the SLO's."
    )

    interval_s: Seconds = Field(15.0, gt=0, description="Pause between two decisions.")
    window_s: Seconds = Field(60.0, ge=10, description="Past that rates are taken over.")
    up_pause_s: Seconds = Field(
        30.0,
        ge=0,
        description="Time that new replicas have to work off a backlog before it asks for more.",
    )
    down_after_s: Seconds = Field(
        300.0, ge=0, description="Time for which fewer must have been enough."
    )
    down_pause_s: Seconds = Field(60.0, ge=0, description="Pause between two steps down.")
    down_part: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Largest part of a pool that one step takes; one may always go.",
    )

    host: str = Field("127.0.0.1", description="Address that the metrics port binds to.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes a free one."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages to log."
    )
    log_format: Literal["console", "json"] = Field("console", description="Form of log lines.")

    @model_validator(mode="after")
    def _bounded(self) -> "AutoscaleSettings":
        if self.prefill is None and self.decode is None:
            raise ValueError("give prefill, decode or both, as in deployment/diptych-prefill")
        for role in ("prefill", "decode"):
            least, most = getattr(self, f"{role}_min"), getattr(self, f"{role}_max")
            if least > most:
                raise ValueError(f"{role}_min ({least}) must not be more than {role}_max ({most})")
        return self

    def pace(self, least: int, most: int) -> Pace:
        """How a pool with such bounds is scaled."""
        return Pace(
            min_replicas=least,
            max_replicas=most,
            up_pause_s=self.up_pause_s,
            down_after_s=self.down_after_s,
            down_pause_s=self.down_pause_s,
            down_part=self.down_part,
        )

    @property
    def targets(self) -> Targets:
        """What both pools are steered to."""
        return Targets(
            backlog_s=self.backlog_s,
            busy=self.busy,
            kv=self.kv,
            batch=self.batch,
            itl_s=self.itl_s,
        )
