"""What a user can set on a router."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from core.settings import ByteSize, Seconds, secret_names
from telemetry.faults import fault_text

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[^\s:\[\]]+):(\d{1,5})")


def _checked_address(address: str) -> str:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"`{address}` is not host:port, such as 127.0.0.1:9001")
    return address


Address = Annotated[str, AfterValidator(_checked_address)]
"""host:port of a worker's gRPC port."""


class RouterSettings(BaseModel):
    """Settings of one router. User intent only: what follows from it is derived elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "demo",
        description="Where tokenizer and chat template are: a folder in Hugging Face form, a .gguf "
        "file, or `demo` (SmolLM2-135M).",
    )
    served_model_name: str | None = Field(
        None, description="Name in the API; default: the one that the workers announce."
    )
    tool_parser: Literal["auto", "hermes", "llama3", "mistral", "none"] = Field(
        "auto",
        description="How the model writes function calls; auto: what the chat template shows.",
    )
    reasoning_parser: Literal["auto", "think", "none"] = Field(
        "auto",
        description="Whether the model thinks between <think> and </think> before it answers; "
        "auto: what the chat template shows.",
    )

    host: str = Field("127.0.0.1", description="Address that the HTTP port binds to.")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    discovery: Literal["static", "kubernetes"] = Field(
        "static",
        description="Where workers are found: static: those named by prefill and decode; "
        "kubernetes: those that EndpointSlices list (needs the extra `k8s`).",
    )
    kubernetes_namespace: str | None = Field(
        None, description="Namespace of the EndpointSlices; default: the one of this pod."
    )
    kubernetes_selector: str = Field(
        "app.kubernetes.io/part-of=diptych",
        min_length=1,
        description="Labels that an EndpointSlice has if its endpoints are workers.",
    )
    prefill: tuple[Address, ...] = Field(
        (), description="host:port of every prefill worker, separated by commas."
    )
    decode: tuple[Address, ...] = Field(
        (), description="host:port of every decode worker, separated by commas."
    )
    auth_token: SecretStr | None = Field(
        None, description="Shared token that every gRPC call to a worker carries."
    )
    tls_cert: str | None = Field(
        None,
        description="PEM file of this router's certificate; all TLS files are read again when "
        "they change.",
    )
    tls_key: str | None = Field(None, description="PEM file of the certificate's key.")
    tls_ca: str | None = Field(
        None, description="PEM file of the CA that workers' certificates must come from."
    )
    tls_server_name: str | None = Field(
        None,
        description="Name that workers' certificates bear; default: the address of each.",
    )

    api_keys: str | None = Field(
        None,
        description="YAML file of the API keys that clients need, made by `diptych keys new`; read "
        "again when it changes. Default: no keys are needed.",
    )
    cache_secret: SecretStr | None = Field(
        None,
        description="With API keys: what keeps tenants' cached blocks apart, the same on every "
        "router; default: auth_token.",
    )
    http_tls_cert: str | None = Field(
        None,
        description="PEM file of the HTTP port's certificate chain; read again when it changes.",
    )
    http_tls_key: str | None = Field(None, description="PEM file of that certificate's key.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port that shows /metrics, /healthz and /readyz in plain HTTP, without keys; 0 "
        "takes a free one. Default: none; the HTTP port has them as /metrics, /health and /ready.",
    )
    metrics_host: str | None = Field(
        None, description="Address that the metrics port binds to; default: that of `host`."
    )
    max_connections: int = Field(
        4096, ge=1, description="Most open HTTP connections; one more is answered 503."
    )
    max_body: ByteSize = Field(
        ByteSize(16 << 20), description="Largest body of a request; a larger one is answered 413."
    )
    head_timeout_s: Seconds = Field(
        10.0, gt=0, description="Time that a request's headers have to arrive."
    )
    body_timeout_s: Seconds = Field(
        30.0, gt=0, description="Time that a request's body has to arrive."
    )

    max_in_flight: int = Field(
        1024, ge=1, description="Most requests on workers at once; one more waits in the queue."
    )
    max_queued: int = Field(
        1024, ge=0, description="Most requests in the queue; one more is answered 429."
    )
    max_backlog_s: Seconds = Field(
        10.0,
        gt=0,
        description="Prompts wait in the router's queue, by priority and in turn, while every "
        "worker has this many seconds of prompts to compute.",
    )
    request_timeout_s: Seconds = Field(
        600.0, gt=0, description="Time that a request has from its arrival to its last token."
    )
    max_attempts: int = Field(
        4,
        ge=1,
        description="Attempts in a row that may fail before the request does; one that brought 16 "
        "tokens begins the count anew, so that a long output may outlive any number of workers.",
    )
    retry_backoff_s: Seconds = Field(
        0.1,
        gt=0,
        description="Wait before a request goes back to a worker that failed it; doubles each "
        "time, five times at most. Another worker is tried at once.",
    )
    no_worker_grace_s: Seconds = Field(
        10.0, ge=0, description="How long a request waits while no worker can take it."
    )
    stuck_after_s: Seconds = Field(
        15.0,
        gt=0,
        description="A request that waits longer for its first token, or for decode's first one, "
        "goes to another worker if its own forgets it: serves later ones, or nobody. Sooner where "
        "a third of its time is less, later where twice the predicted time is more.",
    )
    breaker_failures: int = Field(
        3,
        ge=1,
        description="Failures of a worker in a row, each within a minute of the one before, after "
        "which it gets nothing while another can serve; a client's fault never counts.",
    )
    breaker_open_s: Seconds = Field(
        2.0,
        gt=0,
        description="How long such a worker, or a pair whose hand-over failed, is left alone until "
        "one request tries it; doubles each time up to breaker_open_max_s.",
    )
    breaker_open_max_s: Seconds = Field(
        60.0, gt=0, description="Longest time that one is left alone."
    )
    connect_timeout_s: Seconds = Field(
        5.0, gt=0, description="Time that a worker has to answer when the router attaches to it."
    )
    worker_silence_s: Seconds = Field(
        3.0, gt=0, description="A worker that says nothing for this long is taken for lost."
    )
    reconnect_max_s: Seconds = Field(
        2.0, gt=0, description="Longest wait between two attempts to reach a lost worker."
    )
    link_queue: int = Field(
        4096, ge=16, description="Most unsent messages to one worker before it is taken for lost."
    )

    local_prefill_max_tokens: int = Field(
        0,
        ge=0,
        description="A prompt with at most this many tokens that the decode worker has not cached "
        "is computed there, without a transfer; 0: never.",
    )
    default_prefill_tokens_per_s: float = Field(
        2000.0, gt=0, description="Prefill rate assumed while no worker has measured its own."
    )
    default_decode_step_s: Seconds = Field(
        0.03, gt=0, description="Decode step assumed while no worker has measured its own."
    )
    transfer_bytes_per_s: float = Field(
        1e9,
        gt=0,
        description="Speed assumed for moving KV blocks between two workers that have not measured "
        "their own.",
    )
    prediction_ttl_s: Seconds = Field(
        60.0,
        gt=0,
        description="How long at most a prompt that was sent to a worker counts as cached there "
        "before the worker says so itself.",
    )

    slo_ttft_s: Seconds = Field(
        1.0, gt=0, description="SLO: time to the first token; metrics count who met it."
    )
    slo_tpot_s: Seconds = Field(
        0.015, gt=0, description="SLO: mean time per output token after the first."
    )
    slo_itl_s: Seconds = Field(
        0.025, gt=0, description="SLO: gap between two tokens, for 99 in 100 gaps of a sequence."
    )

    console: bool = Field(
        True, description="Serve the page at /console: a chat, the fleet, where time went."
    )
    trace_endpoint: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector (OTLP over HTTP, such as "
        "http://collector:4318) that gets a trace of each request; needs the extra `tracing`.",
    )
    trace_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the requests to trace; one that comes with a traceparent is traced "
        "if that says so.",
    )
    timelines: int = Field(
        4096, ge=0, description="Recent requests whose timeline can be asked for."
    )
    shutdown_grace_s: Seconds = Field(
        20.0, ge=0, description="Time that SIGTERM leaves running requests to finish."
    )
    faults: Annotated[str, AfterValidator(fault_text)] = Field(
        "",
        description="Fails on purpose, for tests: a text such as rpc.link.send:cut@0.01;seed=7, "
        "or a file of it; docs/fault-injection.md has the names; default: none.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages to log."
    )
    log_format: Literal["console", "json"] = Field("console", description="Form of log lines.")

    def facts(self) -> dict[str, object]:
        """The settings for others to see: without secrets, nor where they are kept."""
        hidden = {name for name in type(self).model_fields if name.endswith(("_key", "_keys"))}
        return self.model_dump(mode="json", exclude=hidden.union(secret_names(type(self))))

    @model_validator(mode="after")
    def _one_source(self) -> "RouterSettings":
        if self.discovery == "kubernetes" and (self.prefill or self.decode):
            raise ValueError(
                "prefill and decode name workers of discovery = static; leave them out with "
                "kubernetes."
            )
        return self
