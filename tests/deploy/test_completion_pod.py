"""The pod of `helm test` asks what a client would ask, and tells success from failure.

Its script is taken out of the rendered pod and run beside a real HTTP side of a router.
"""

import asyncio
import sys
from collections.abc import Iterator
from itertools import chain, repeat

from core.errors import InvalidRequestError, UnavailableError
from tests.support.helm import container, render
from tests.support.router_api import Script, ScriptedGenerator, says, serve


async def outcome(scripts: Iterator[Script], *, deadline_s: float = 20) -> tuple[int, str]:
    """Exit status and output of the pod's command; each request gets the next script."""
    pod = container(render().one("Pod", "-test")["spec"])
    env = {each["name"]: each["value"] for each in pod["env"]}
    assert env["ENDPOINT"] == "http://demo-diptych-router:8000"
    assert pod["command"] == ["python", "-c"]
    assert env["HANDS_OVER"] == "true"
    async with serve(ScriptedGenerator(script=lambda _: next(scripts))) as served:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", *pod["args"]),
            env={"ENDPOINT": served.url, "DEADLINE_S": str(deadline_s), "HANDS_OVER": "true"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_completion_is_a_success() -> None:
    code, text = await outcome(iter([says(" Paris"), says("!")]))
    assert (code, "Paris" in text) == (0, True), text


async def test_pools_between_which_no_kv_moves_are_a_failure() -> None:
    # Met elsewhere: requests ran on decode alone for days, and nothing said so.
    code, text = await outcome(repeat(says(" Paris", mode="decode_only")), deadline_s=0)
    assert (code, "no KV moved" in text) == (1, True), text
    code, text = await outcome(repeat(says(" Paris", mode="local")))
    assert code == 0, text


def test_hand_overs_are_asked_for_where_there_are_pools_of_both_roles() -> None:
    def asked(pools: dict[str, object]) -> object:
        env = container(render({"pools": pools}).one("Pod", "-test")["spec"])["env"]
        return next(each["value"] for each in env if each["name"] == "HANDS_OVER")

    assert asked({"prefill": None}) == "false"
    assert asked({"prefill": {"replicas": 0}}) == "false"
    assert asked({"more": {"role": "decode"}}) == "true"


async def test_workers_that_are_still_loading_are_waited_for() -> None:
    loading = Script(refuse=UnavailableError("no worker is ready"))
    code, text = await outcome(chain([loading], repeat(says(" Paris"))))
    assert code == 0, text


async def test_no_worker_in_time_is_a_failure_that_says_why() -> None:
    loading = Script(refuse=UnavailableError("no worker is ready"))
    code, text = await outcome(repeat(loading), deadline_s=0)
    assert (code, "no worker is ready" in text) == (1, True), text


async def test_refused_request_is_a_failure_at_once() -> None:
    refused = Script(refuse=InvalidRequestError("that can't be asked"))
    code, text = await outcome(iter([refused]))
    assert (code, "that can't be asked" in text) == (1, True), text


def test_key_is_sent_where_keys_are_needed() -> None:
    def key(values: dict[str, object]) -> object:
        env = container(render({"router": {"apiKeys": values}}).one("Pod", "-test")["spec"])["env"]
        return next((e["valueFrom"]["secretKeyRef"] for e in env if e["name"] == "API_KEY"), None)

    assert key({"enabled": False}) is None
    assert key({"enabled": True}) == {"name": "demo-diptych-api-keys", "key": "key"}
    existing = {"enabled": True, "existingSecret": "file", "plainKeySecret": "plain"}
    assert key(existing) == {"name": "plain", "key": "key"}
