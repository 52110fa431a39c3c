"""Clients of the router that each module serves as `served`."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from tests.support.router_api import Served, client


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with client(served) as opened:
        yield opened


@pytest.fixture
async def api(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as opened:
        yield opened
