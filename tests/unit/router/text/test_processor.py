import asyncio
import time

from router.text.processor import HUGE_CHARS, INLINE_CHARS, LONG_CHARS
from tests.support.router_api import SPECIALS, byte_text, byte_tokenizer


async def test_a_long_text_is_encoded_while_others_go_on() -> None:
    processor, text = byte_text(), "hello world, " * (HUGE_CHARS // 10)
    began = last = time.perf_counter()
    longest = 0.0
    encoding = asyncio.create_task(processor.encode(text))
    while not encoding.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 0.8 * (last - began)
    assert len(encoding.result()) > len(text) / 10


async def test_texts_of_any_length_are_encoded_alike() -> None:
    processor, tokenizer = byte_text(), byte_tokenizer()
    for length in (0, 1, INLINE_CHARS, INLINE_CHARS + 1, HUGE_CHARS + 1):
        text = ("abc hello<|im_end|>" * (length // 10 + 1))[:length]
        for special in (True, False):
            expected = tokenizer.encode(text, add_special_tokens=special).ids
            assert await processor.encode(text, add_special_tokens=special) == expected


async def test_of_a_text_that_can_not_fit_only_the_beginning_is_encoded() -> None:
    processor, room = byte_text(), 10
    far_too_long, dense = "x" * 10_000, SPECIALS[0] * 2 * room
    assert 2 * room < len(await processor.encode(far_too_long, room=room)) < len(far_too_long)
    assert len(dense) > LONG_CHARS * room
    assert len(await processor.encode(dense, room=room)) == 2 * room
