"""What is to be sent, and when: known before anything is sent, and again the same for a seed.

Arrivals name lengths, not tokens: each client process writes its prompts itself
(`diptych.bench.prompts`). Pure.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from core.errors import ConfigError
from diptych.planning.trace import TracedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to be sent."""

    number: int
    """Its own in a run; negative for a warm-up request."""
    at_s: float = 0.0
    """Seconds after the start; without meaning in a closed loop."""
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[str] = ()
    """Names of the prompt's first blocks of 512 tokens; equal names are equal tokens."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens from `low` to `high`, each as likely as any other."""

    low: int
    high: int

    @classmethod
    def of(cls, text: str) -> "Lengths":
        """Read "512" or "128..1024".

        Raises:
            ValueError: it is neither.
        """
        match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+))?\s*", text)
        if match is None:
            raise ValueError("a length is a number of tokens, or a range as in 128..1024")
        lengths = cls(int(match[1]), int(match[2] or match[1]))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError("a length is at least 1, and a range goes upwards")
        return lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths of requests by their numbers."""

    prompt: Lengths
    output: Lengths
    seed: int

    def arrival(self, number: int, at_s: float = 0.0) -> Arrival:
        """The request of that number."""
        chance = random.Random(f"{self.seed}/{number}/size")
        return Arrival(
            number=number,
            at_s=at_s,
            prompt_tokens=chance.randint(self.prompt.low, self.prompt.high),
            output_tokens=chance.randint(self.output.low, self.output.high),
        )

    def endless(self, first: int, step: int) -> Iterator[Arrival]:
        """Requests for a closed loop: every `step`th from `first` on."""
        return (self.arrival(number) for number in count(first, step))


def open_loop(
    sizes: Sizes, *, rate: float, requests: int | None = None, seconds: float | None = None
) -> list[Arrival]:
    """Independent requests, however many are under way: a Poisson process.

    Args:
        sizes: their lengths; its seed is that of the process too.
        rate: requests per second, on average; infinite: all at once.
        requests: how many at most.
        seconds: how long at most they come.

    Raises:
        ConfigError: there would be no end, or nothing.
    """
    if requests is None and (seconds is None or math.isinf(rate)):
        raise ConfigError("Arrivals need an end: give --requests, or --duration with a finite rate")
    chance = random.Random(f"{sizes.seed}/arrivals")
    found: list[Arrival] = []
    at_s = 0.0
    while requests is None or len(found) < requests:
        at_s += 0.0 if math.isinf(rate) else chance.expovariate(rate)
        if seconds is not None and at_s >= seconds:
            break
        found.append(sizes.arrival(len(found), at_s))
    if not found:
        raise ConfigError(f"No request comes within {seconds:g} s at {rate:g} per second.")
    return found


def replayed(
    traced: Sequence[TracedRequest],
    *,
    longest: int | None = None,
    requests: int | None = None,
    seconds: float | None = None,
) -> tuple[list[Arrival], int]:
    """Requests of a trace in its own time, sharing prefixes as they did there.

    Args:
        traced: in the order of their arrival.
        longest: requests of more tokens, prompt and output together, are left out.
        requests: how many to take at most.
        seconds: how much of the trace to take at most.

    Returns:
        The arrivals, the first at 0, and how many were left out on the way for their length.

    Raises:
        ConfigError: none is left.
    """
    found: list[Arrival] = []
    left_out, start = 0, 0.0
    for each in traced:
        if longest is not None and each.prompt_tokens + each.output_tokens > longest:
            left_out += 1
            continue
        if not found:
            start = each.arrives_at
        if len(found) == requests or (seconds is not None and each.arrives_at - start >= seconds):
            break
        found.append(
            Arrival(
                number=len(found),
                at_s=each.arrives_at - start,
                prompt_tokens=each.prompt_tokens,
                output_tokens=each.output_tokens,
                blocks=[block.hex() for block in each.hashes],
            )
        )
    if not found:
        raise ConfigError(f"No request of the trace has at most {longest} tokens.")
    return found, left_out
