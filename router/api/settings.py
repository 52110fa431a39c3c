"""What the operator decides about the HTTP side."""

from dataclasses import dataclass, field

from router.api.slo import SloTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Intent only. Times in seconds."""

    served_model_name: str | None = None
    """Name that clients use; None: the name that the workers report."""
    default_timeout_s: float = 600.0
    """Deadline of a request that brings no x-request-timeout header."""
    max_timeout_s: float = 3600.0
    """Longest x-request-timeout that is accepted."""
    deadline_grace_s: float = 2.0
    """How long after its deadline a request that the fleet has not ended is cut off here."""
    body_timeout_s: float = 30.0
    """Longest wait for a request's body."""
    body_limit_bytes: int = 16 << 20
    keep_alive_s: float = 15.0
    """A stream that was silent this long gets a comment, so that proxies keep it open."""
    completion_max_tokens: int = 16
    """max_tokens of /v1/completions when the client gives none, as OpenAI's."""
    max_choices: int = 128
    """Most sequences of one request: prompts times n."""
    max_in_flight: int = 4096
    """Most generation requests inside the API at once; more get 429."""
    stored_responses: int = 1024
    """Most responses of /v1/responses that are remembered."""
    stored_responses_bytes: int = 64 << 20
    """Bytes that they may take together."""
    console: bool = True
    """Serve the page at /console."""
    recent_requests: int = 4096
    """Requests whose timeline can be asked for by x-request-id or answer id."""
    slo: SloTargets = field(default_factory=SloTargets)
