"""How much a key may do: requests and tokens a minute, requests at once.

Requests and tokens come out of buckets that refill evenly and hold a minute's worth. A prompt is
counted when its request is taken, output as it is generated: a bucket may go into debt by what was
running, and is then closed until the debt is paid, so that nothing has to be reserved for outputs
of unknown length. Each router process counts for itself. Pure: time comes from a given clock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from core.clock import Clock
from router.api.errors import Headers, HttpError

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one key; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


class Bucket:
    """Refills evenly up to what a minute gives."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.capacity = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is in it now; below 0 is debt."""
        now = self._clock()
        refilled = self._level + (now - self._at) * self.capacity / _MINUTE_S
        self._level, self._at = min(float(self.capacity), refilled), now
        return self._level

    def wait_s(self, amount: int) -> float:
        """Seconds until `amount` may be taken; what exceeds the capacity needs a full bucket."""
        missing = min(amount, self.capacity) - self.level
        return max(0.0, missing * _MINUTE_S / self.capacity)

    def take(self, amount: int) -> None:
        """Take, into debt if need be."""
        self._level = self.level - amount

    def headers(self, kind: str) -> Headers:
        """What it holds, as OpenAI tells it."""
        level = self.level
        full_in_s = (self.capacity - level) * _MINUTE_S / self.capacity
        return [
            (f"x-ratelimit-limit-{kind}".encode(), b"%d" % self.capacity),
            (f"x-ratelimit-remaining-{kind}".encode(), b"%d" % max(0, int(level))),
            (f"x-ratelimit-reset-{kind}".encode(), duration(full_in_s).encode()),
        ]


class Allowance:
    """What one key has left."""

    def __init__(self, name: str, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self._name = name
        self._running = 0
        self._requests = _bucket(limits.requests_per_minute, clock)
        self._tokens = _bucket(limits.tokens_per_minute, clock)

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, for as long as it is being answered.

        Raises:
            HttpError: 429; there may be no other now.
        """
        most = self.limits.max_concurrent
        if most is not None and self._running >= most:
            raise self._refusal(f"{most} requests at once", 1.0)
        if self._requests is not None:
            wait_s = self._requests.wait_s(1)
            if wait_s > 0:
                raise self._refusal(f"{self._requests.capacity} requests a minute", wait_s)
            self._requests.take(1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def take_prompt(self, num_tokens: int) -> None:
        """Count a prompt before it is computed.

        Raises:
            HttpError: 429; the tokens are used up for now.
        """
        if self._tokens is None:
            return
        wait_s = self._tokens.wait_s(num_tokens)
        if wait_s > 0:
            limit = f"{self._tokens.capacity} tokens a minute"
            raise self._refusal(f"{limit}; this prompt has {num_tokens}", wait_s)
        self._tokens.take(num_tokens)

    def take_output(self, num_tokens: int) -> None:
        """Count tokens that were generated."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def headers(self) -> Headers:
        """What an answer says of it."""
        headers: Headers = []
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers += bucket.headers(kind)
        return headers

    def _refusal(self, limit: str, wait_s: float) -> HttpError:
        seconds = max(1, ceil(wait_s))
        return HttpError(
            429,
            "rate_limit_exceeded",
            f"The key {self._name!r} may have {limit}. Try again in {seconds} s.",
            headers=[(b"retry-after", b"%d" % seconds)],
        )


def duration(seconds: float) -> str:
    """A time as OpenAI's headers write it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    if seconds < _MINUTE_S:
        return f"{ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _bucket(per_minute: int | None, clock: Clock) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, clock)
