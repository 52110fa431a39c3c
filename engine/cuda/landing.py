"""Where a step's tokens arrive on the host, and the PendingStep that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from core.tokens import TokenLogprobs
from engine.cuda.events import QueuePoint
from engine.cuda.sampling_copies import to_host
from engine.cuda.sampling_logprobs import DeviceLogprobs, HostLogprobs
from engine.plan import StepResult
from engine.sampler.prompt_logprobs import PromptScores


class Landing:
    """Pinned memory for one step at a time."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned)
        self.arrived = QueuePoint(device)
        self.logprobs: HostLogprobs | None = None
        self.scores: PromptScores | None = None

    def fetch(
        self,
        tokens: torch.Tensor,
        logprobs: DeviceLogprobs | None,
        scores: PromptScores | None = None,
    ) -> None:
        """Start to copy a step's tokens [N] and log probabilities; the host does not wait."""
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self.logprobs = None if logprobs is None else logprobs.to_host()
        self.scores = None if scores is None else replace(scores, packed=to_host(scores.packed))
        self.arrived.record()


@dataclass(frozen=True, slots=True)
class LandingStep:
    """Implements engine.executor.PendingStep."""

    landing: Landing
    num_chunks: int
    sampled: Sequence[tuple[int, int]]
    """(chunk, row) of each token."""

    def wait(self) -> StepResult:
        """See PendingStep."""
        self.landing.arrived.wait()
        tokens = self.landing.tokens.tolist()
        ids: list[int | None] = [None] * self.num_chunks
        logprobs: list[TokenLogprobs | None] = [None] * self.num_chunks
        for chunk, row in self.sampled:
            ids[chunk] = tokens[row]
        if self.landing.logprobs is not None:
            found = self.landing.logprobs.results()
            for chunk, row in self.sampled:
                logprobs[chunk] = found.get(row)
        scores = self.landing.scores
        return StepResult(ids, logprobs, {} if scores is None else scores.results())
