"""Where requests spent their time, asked of a Diptych router after a run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from diptych.bench.jobs import Target
from diptych.bench.streaming import Outcome

_ANSWER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timelines:
    """Stages of several requests."""

    raw: Sequence[dict[str, Any]]
    """As the router gave them, one for each sequence."""
    missing: str = ""
    """Why there are none, or fewer than were asked for."""

    @property
    def stages(self) -> dict[str, float]:
        """Mean seconds per request in each stage, in the order of a request."""
        sums: dict[str, float] = defaultdict(float)
        for each in self.raw:
            for stage in each["stages"]:
                sums[stage["name"]] += stage["seconds"]
        return {name: seconds / len(self.raw) for name, seconds in sums.items() if seconds}


async def fetch(target: Target, outcomes: Sequence[Outcome], count: int) -> Timelines:
    """Timelines of the latest requests that went well: the router forgets older ones."""
    done = [each for each in outcomes if not each.cause and each.request_id][-count:]
    raw: list[dict[str, Any]] = []
    missing = "" if done else "No request that went well has an id to ask for."
    async with target.client() as http:
        for outcome in done:
            try:
                answer = await http.get(
                    f"/v1/requests/{outcome.request_id}/timeline", timeout=_ANSWER_S
                )
                if answer.status_code != httpx.codes.OK:
                    missing = f"HTTP {answer.status_code} from /v1/requests/ID/timeline"
                    continue
                raw += answer.json()["sequences"]
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                missing = repr(error)
    return Timelines(raw=raw, missing=missing)
