"""How tokens reach a reader: where they arrive while it waits, else out of a buffer."""

import asyncio
from collections.abc import Sequence

import pytest

from core.errors import UnavailableError
from core.finish import FinishReason
from core.sampling import SamplingParams
from router.fleet.worker import LegEnd, Phase
from router.generation import Token
from router.ledger import Leg, RequestLedger
from router.run import Run
from router.timeline import RequestTimeline
from tests.support.router_fleet import make_request


@pytest.fixture
async def run() -> Run:
    request = make_request([1], 100)
    ledger = RequestLedger(
        prompt_len=1,
        sampling=SamplingParams(max_tokens=100),
        eos_token_ids=(),
        max_model_len=1000,
        max_attempts=1,
    )
    ledger.place([Leg("w", 1, Phase.LOCAL)], mode="decode_only")
    return Run(request, ledger, RequestTimeline(request=request, clock=lambda: 0.0))


class Reader:
    """Wants no more after each token that is in `pauses`."""

    def __init__(self, pauses: Sequence[int] = ()) -> None:
        self.indices: list[int] = []
        self._pauses = pauses

    def __call__(self, tokens: Sequence[Token]) -> bool:
        self.indices += [token.index for token in tokens]
        return self.indices[-1] not in self._pauses


def arrives(run: Run, *indices: int) -> None:
    run.push(run.ledger.tokens("w", 1, [Token(index, 7) for index in indices]).tokens)


def ends(run: Run) -> None:
    run.ledger.finished("w", LegEnd(request_id="r", attempt=1, reason=FinishReason.LENGTH))
    run.wake()


async def test_tokens_are_taken_where_they_arrive(run: Run) -> None:
    reader = Reader()
    feeding = asyncio.create_task(run.feed(reader))
    await asyncio.sleep(0)
    for index in range(3):
        arrives(run, index)
        assert reader.indices[-1] == index, "no task had to run for it"
    ends(run)
    assert await feeding is False


async def test_tokens_wait_for_a_reader_that_wants_no_more(run: Run) -> None:
    reader = Reader(pauses=[1, 4])
    feeding = asyncio.create_task(run.feed(reader))
    await asyncio.sleep(0)
    for index in range(4):
        arrives(run, index)
    assert reader.indices == [0, 1]
    assert await feeding is True
    arrives(run, 4)
    assert await run.feed(reader) is True
    assert reader.indices == [0, 1, 2, 3, 4]
    ends(run)
    assert await run.feed(reader) is False


async def test_what_a_reader_raises_is_its_own(run: Run) -> None:
    def take(tokens: Sequence[Token]) -> bool:
        raise LookupError

    feeding = asyncio.create_task(run.feed(take))
    await asyncio.sleep(0)
    arrives(run, 0)
    arrives(run, 1)
    with pytest.raises(LookupError):
        await feeding


async def test_a_reader_that_was_cancelled_is_given_nothing(run: Run) -> None:
    reader = Reader()
    feeding = asyncio.create_task(run.feed(reader))
    await asyncio.sleep(0)
    feeding.cancel()
    await asyncio.wait([feeding])
    arrives(run, 0)
    assert reader.indices == []


async def test_an_error_comes_after_the_tokens_that_were_made(run: Run) -> None:
    arrives(run, 0)
    run.ledger.stop(UnavailableError("test"))
    await run.begun()
    reader = Reader()
    with pytest.raises(UnavailableError):
        await run.feed(reader)
    assert reader.indices == [0]
