"""The console in a real browser, on the whole system."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import browser_page, chromium
from tests.support.cluster import Cluster, cluster

STAGES = ["tokenize", "route", "prefill", "transfer", "first decode", "decode", "deliver"]


@pytest.fixture(scope="module")
def system(tiny_llama: Path) -> Iterator[Cluster]:
    chromium()  # skips before anything is started
    with cluster(tiny_llama) as running:
        yield running
        running.wait_balanced()


async def past_the_end(route: Any) -> None:
    """Send a chat on with ignore_eos, which the page has no field for."""
    await route.continue_(post_data=route.request.post_data_json | {"ignore_eos": True})


async def test_chat_fleet_and_waterfall(system: Cluster) -> None:
    async with browser_page() as (page, wrong):
        await page.goto(f"{system.url}/console")
        await page.locator("#model:not([disabled])").wait_for()
        await page.fill("#temperature", "0")
        await page.fill("#max-tokens", "24")
        await page.fill("#prompt", "Tell me of the <b>sea</b>.")
        await page.keyboard.press("Enter")
        await page.locator("a.timeline").wait_for()
        answer = page.locator(".turn.assistant")
        assert await page.locator(".turn.user").inner_text() == "Tell me of the <b>sea</b>."
        with system.openai() as client:
            expected = client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=[{"role": "user", "content": "Tell me of the <b>sea</b>."}],
                max_tokens=24,
                temperature=0,
            )
        written = await answer.locator(".text:not(.thought)").text_content()
        assert written == expected.choices[0].message.content
        facts = await answer.locator(".facts").inner_text()
        assert re.search(r"TTFT [\d.]+ (ms|s)", facts)
        assert re.search(r"[\d.,]+ tokens/s", facts)

        await page.get_by_role("link", name="timeline").click()
        await page.locator(".waterfall").wait_for()
        names = await page.locator(".stage .name").all_inner_texts()
        assert [name for name in names if name in STAGES] == STAGES
        widths = await page.locator(".stage .span").evaluate_all(
            "bars => bars.map(bar => bar.getBoundingClientRect().width)"
        )
        assert len(widths) == len(names) and max(widths) > 50
        decision = await page.locator(".attempt").inner_text()
        assert "chosen" in decision and "seconds" in decision
        assert await page.locator(".recent li").count() == 2

        await page.get_by_role("link", name="Fleet").click()
        for role in ("prefill", "decode"):
            panel = page.locator(f".panel.{role}")
            await panel.get_by_text("1 of 1 ready").wait_for()
            assert await panel.locator(".bar").count() == 1
        assert "nixl" in await page.locator(".links td").last.inner_text()
        assert wrong == []


async def test_an_answer_can_be_stopped_and_an_error_is_shown(system: Cluster) -> None:
    async with browser_page(viewport={"width": 390, "height": 800}) as (page, wrong):
        await page.route("**/v1/chat/completions", past_the_end)
        await page.goto(f"{system.url}/console")
        await page.locator("#model:not([disabled])").wait_for()
        await page.fill("#max-tokens", "8000")
        await page.fill("#prompt", "Go on for ever")
        await page.get_by_role("button", name="Send").click()
        await page.locator(".facts .ttft").wait_for()
        await page.get_by_role("button", name="Stop").click(force=True)
        await page.get_by_text("stopped").wait_for()
        assert wrong == []

        await page.fill("#max-tokens", "0")
        await page.fill("#prompt", "Nothing")
        await page.keyboard.press("Enter")
        alert = page.get_by_role("alert").last
        await alert.wait_for()
        assert "max_tokens" in await alert.inner_text()
        overflow = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        for view in ("playground", "fleet", "requests"):
            await page.goto(f"{system.url}/console#/{view}")
            await page.locator(f".{view}").wait_for()
            assert not await page.evaluate(overflow), f"{view} is wider than a phone"


async def test_a_wanted_key_is_asked_for_and_sent(system: Cluster) -> None:
    sent: list[str | None] = []

    async def guard(route: Any) -> None:
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer s3cret":
            await route.continue_()
        else:
            error = {"message": "A key is needed.", "code": "unauthorized"}
            await route.fulfill(status=401, json={"error": error})

    async with browser_page() as (page, _):
        await page.route("**/v1/models", guard)
        await page.goto(f"{system.url}/console")
        await page.locator("#key-input").fill("s3cret")
        await page.keyboard.press("Enter")
        await page.locator("#model:not([disabled])").wait_for()
        assert sent[0] is None and sent[-1] == "Bearer s3cret"
        assert await page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
