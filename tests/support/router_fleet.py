"""A dispatcher on fake workers, and short ways to drive it."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

from prometheus_client import CollectorRegistry

from core.sampling import SamplingParams
from router.dispatch import Dispatcher
from router.generation import Generation, GenerationRequest, Token
from router.main import dispatcher_on_fleet
from router.settings import RouterSettings
from tests.support.fake_worker import FakeWorker, until

_ids = count()


def make_request(
    prompt_ids: Sequence[int],
    max_tokens: int = 8,
    *,
    timeout_s: float = 20.0,
    request_id: str | None = None,
    **sampling: object,
) -> GenerationRequest:
    now = time.monotonic()
    return GenerationRequest(
        request_id=request_id or f"r{next(_ids)}",
        prompt_ids=prompt_ids,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        deadline=now + timeout_s,
        received_at=now,
        tokenized_at=now,
    )


async def batches(generation: Generation) -> AsyncIterator[list[Token]]:
    """Tokens as they reach a reader that wants no more after each time."""
    taken: list[Token] = []

    def take(tokens: Sequence[Token]) -> bool:
        taken.extend(tokens)
        return False

    while await generation.feed(take):
        yield taken.copy()
        taken.clear()


async def collect(generation: Generation) -> list[int]:
    """Every token id, after checking that indices come once and in order."""
    tokens: list[Token] = []

    def take(new: Sequence[Token]) -> bool:
        tokens.extend(new)
        return True

    assert not await generation.feed(take)
    assert [token.index for token in tokens] == list(range(len(tokens)))
    return [token.token_id for token in tokens]


async def run(dispatcher: Dispatcher, request: GenerationRequest) -> list[int]:
    async with dispatcher.generate(request) as generation:
        return await collect(generation)


@asynccontextmanager
async def router_on(
    workers: Sequence[FakeWorker],
    *,
    registry: CollectorRegistry | None = None,
    attach: bool = True,
    **settings: object,
) -> AsyncIterator[Dispatcher]:
    """A dispatcher that is attached to every worker."""
    addresses = {
        role: tuple(worker.address for worker in workers if worker.role == role)
        for role in ("prefill", "decode")
    }
    resolved = RouterSettings.model_validate({"reconnect_max_s": 0.2, **addresses, **settings})
    registry = registry or CollectorRegistry()
    async with dispatcher_on_fleet(resolved, registry, None) as (dispatcher, _):
        if attach:
            await until(lambda: ready_workers(registry) == len(workers), "all workers attached")
        yield dispatcher


def ready_workers(registry: CollectorRegistry) -> float:
    return sum(
        registry.get_sample_value("diptych_router_workers", {"role": role, "state": "ready"}) or 0
        for role in ("prefill", "decode")
    )
