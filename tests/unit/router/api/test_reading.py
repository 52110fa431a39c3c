"""Large bodies are read beside the event loop."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from core.errors import InvalidRequestError
from router.api.reading import INLINE_BYTES, BodyReader

LARGE = b'{"a":"' + b"x" * INLINE_BYTES + b'"}'


async def test_others_go_on_while_a_large_body_is_read() -> None:
    went_on = threading.Event()

    async def other() -> None:
        went_on.set()

    def check(data: Mapping[str, Any]) -> int:
        return len(data["a"]) if went_on.wait(10) else 0

    reading = asyncio.create_task(BodyReader().read(LARGE, check))
    await asyncio.sleep(0)
    await other()
    assert await reading == INLINE_BYTES


async def test_a_small_body_is_read_at_once() -> None:
    reader = BodyReader()
    assert await reader.read(b"{}", lambda _: threading.current_thread()) is (
        threading.current_thread()
    )


async def test_what_is_wrong_with_a_large_body_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        await BodyReader().read(LARGE[:-1], dict)
