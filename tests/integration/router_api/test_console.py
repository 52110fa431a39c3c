"""The console's files and the endpoints that it reads, as HTTP."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest

from router.api.settings import ApiSettings
from tests.support.router_api import ScriptedGenerator, ScriptedView, serve

PARTS = re.compile(r'(?:from|import|href=|src=)\s*"([^"]+)"')
MAX_BYTES = 60_000


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    view = ScriptedView([{"request_id": f"r{i}"} for i in range(60)])
    async with (
        serve(ScriptedGenerator(), observed=view) as served,
        httpx.AsyncClient(base_url=served.url) as client,
    ):
        yield client


async def test_the_page_and_all_its_parts_come_from_here(http: httpx.AsyncClient) -> None:
    seen: dict[str, httpx.Response] = {}
    wanted = ["/console"]
    while wanted:
        path = wanted.pop()
        if path in seen:
            continue
        seen[path] = answer = await http.get(path)
        assert answer.status_code == 200, path
        for name in PARTS.findall(answer.text):
            assert not name.startswith(("//", "http:", "https:", "data:")), name
            if not name.startswith("#"):
                wanted.append(str(answer.url.join(name).path))
    assert len(seen) > 8
    assert sum(len(answer.content) for answer in seen.values()) < MAX_BYTES
    assert {answer.headers["content-type"].split(";")[0] for answer in seen.values()} == {
        *("text/html", "text/css", "text/javascript", "image/svg+xml"),
    }


async def test_the_page_may_load_and_run_nothing_else(http: httpx.AsyncClient) -> None:
    for path in ("/console", "/console/main.js"):
        headers = (await http.get(path)).headers
        policy = headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert not re.search(r"unsafe|\*|https?:|data:", headers["content-security-policy"])
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    page = (await http.get("/console")).text
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\son\w+=|\sstyle=", page)


async def test_no_script_turns_text_into_markup(http: httpx.AsyncClient) -> None:
    page = (await http.get("/console")).text
    names = {*PARTS.findall(page), *PARTS.findall((await http.get("/console/main.js")).text)}
    scripts = [name for name in names if name.endswith(".js")]
    assert scripts
    for name in scripts:
        source = (await http.get(f"/console/{name.rsplit('/', 1)[-1]}")).text
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source
        )


async def test_an_unchanged_file_is_not_sent_again(http: httpx.AsyncClient) -> None:
    first = await http.get("/console/style.css")
    assert first.headers["cache-control"] == "no-cache"
    again = await http.get("/console/style.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/console/nothing.js", "/console/..%2fpage.py", "/console/"])
async def test_no_other_file_is_served(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_it_can_be_left_out() -> None:
    async with (
        serve(ScriptedGenerator(), settings=ApiSettings(console=False)) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        assert (await http.get("/console")).status_code == 404
        assert (await http.get("/console/main.js")).status_code == 404
        assert (await http.get("/v1/fleet")).status_code == 200


async def test_fleet_and_requests_are_json_of_now(http: httpx.AsyncClient) -> None:
    fleet = await http.get("/v1/fleet")
    assert fleet.json() == {"object": "fleet", "workers": [], "links": []}
    assert fleet.headers["cache-control"] == "no-store"
    listed = (await http.get("/v1/requests")).json()
    assert (listed["object"], len(listed["data"])) == ("list", 50)
    assert len((await http.get("/v1/requests?limit=3")).json()["data"]) == 3


@pytest.mark.parametrize("limit", ["0", "501", "-1", "x", "", "9" * 5000, "٣"])
async def test_a_limit_that_makes_no_sense_is_refused(http: httpx.AsyncClient, limit: str) -> None:
    answer = await http.get("/v1/requests", params={"limit": limit})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"
