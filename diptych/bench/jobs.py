"""What the parent tells a client process: whom to ask, how, and which share of the load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import orjson

from diptych.bench.arrivals import Arrival, Sizes
from diptych.bench.prompts import Prompts
from diptych.bench.streaming import Asked
from diptych.chat.client import trusted

_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An endpoint and the form of the requests that it takes."""

    url: str
    """Without /v1."""
    model: str
    chat: bool = False
    fields: Mapping[str, object] = field(default_factory=dict)
    """Of every request, beside prompt, model and lengths."""
    exact: bool = True
    """Every answer must be as long as was asked."""
    timeout_s: float = 600.0
    """For a whole request."""
    api_key: str | None = field(default=None, repr=False)
    ca: str | None = None

    def client(self) -> httpx.AsyncClient:
        """Connections to it, as many as it takes."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            timeout=httpx.Timeout(self.timeout_s, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            verify=trusted(self.ca) or self.url.startswith("https:"),
            trust_env=False,
        )

    def asked(self, prompt: str | list[int], output_tokens: int) -> Asked:
        """The request for that prompt."""
        said = (
            {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        )
        body = {"model": self.model, **said, "max_tokens": output_tokens, "stream": True}
        return Asked(
            path="/v1/chat/completions" if self.chat else "/v1/completions",
            body=orjson.dumps(body | dict(self.fields)),
            output_tokens=output_tokens if self.exact else None,
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The share of one client process."""

    target: Target
    prompts: Prompts
    arrivals: Sequence[Arrival] = ()
    sizes: Sizes | None = None
    """Instead of arrivals: requests without end, in a closed loop until `until_s`."""
    share: int = 0
    shares: int = 1
    concurrency: int = 0
    """Requests under way in a closed loop; 0: an open one."""
    until_s: float | None = None
    """When a closed loop sends no more, in seconds after the start."""
    warmup: Sequence[Arrival] = ()

    def asked(self, arrival: Arrival) -> Asked:
        """The request of that arrival."""
        return self.target.asked(self.prompts.write(arrival), arrival.output_tokens)

    @property
    def limit_s(self) -> float:
        """Longest time that it can take, in seconds after the start."""
        own = self.target.timeout_s
        if not self.concurrency:
            return max(each.at_s for each in self.arrivals) + own
        rounds = -(-len(self.arrivals) // self.concurrency) * own
        return rounds if self.until_s is None else self.until_s + own
