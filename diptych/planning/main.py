"""`diptych plan`: how many prefill and decode replicas meet an SLO."""

import json
import sys
from collections.abc import Sequence

import httpx

from core.errors import DiptychError
from core.settings import load_or_exit
from diptych.planning.answer import as_json, as_text, plan
from diptych.planning.measured import TIMEOUT_S, Measured, ask_prometheus, watch_router
from diptych.planning.question import ask
from diptych.planning.settings import PlanSettings


def main(argv: Sequence[str]) -> int:
    """Plan and print; returns the exit status, 1 if no plan can be made."""
    settings = load_or_exit(PlanSettings, argv, prog="diptych plan", env_prefix="DIPTYCH_PLAN_")
    try:
        question = ask(settings, measure(settings))
        answer = plan(question, headroom=settings.headroom, max_replicas=settings.max_replicas)
    except DiptychError as error:
        print(f"diptych plan: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(answer), indent=2) if settings.json_ else as_text(answer))
    return 0


def measure(settings: PlanSettings) -> Measured:
    """What the named system says; nothing if none is named.

    Raises:
        UnavailableError: it can't be read.
    """
    if settings.prometheus is not None:
        with httpx.Client(base_url=settings.prometheus, timeout=TIMEOUT_S) as client:
            return ask_prometheus(client, settings.window_s)
    if settings.router is not None:
        key = settings.api_key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        with httpx.Client(base_url=settings.router, timeout=TIMEOUT_S, headers=headers) as client:
            return watch_router(client, settings.watch_s)
    return Measured()
