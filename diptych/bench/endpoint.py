"""What an endpoint is and takes: its model, its version, token ids, the fields of a request.

Learnt by asking, before anything is measured, so that one command loads endpoints that differ.
"""

import re
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx

from core.errors import ConfigError, DiptychError, UnavailableError
from diptych.bench.arrivals import Arrival
from diptych.bench.jobs import Target
from diptych.bench.prompts import WORDS, Prompts
from diptych.bench.settings import BenchSettings
from diptych.bench.streaming import BROKEN, NO_CONNECTION, TIMEOUT, Outcome, ask, reason

_FIELDS: tuple[dict[str, object], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Tried in turn: ours, vLLM and SGLang take the first, OpenAI itself the second."""
_UNKNOWN_FIELD = ("HTTP 400", "HTTP 422")
_FEW_WORDS, _MORE_WORDS = 8, 72
_PROBE_TOKENS = 2
_ANSWER_S = 30.0
"""For what needs no generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint, as far as it says."""

    target: Target
    prompts: Prompts
    software: str | None
    version: str | None
    max_model_len: int | None
    """Tokens of prompt and output together."""
    notes: tuple[str, ...] = ()
    """What makes its figures less comparable."""


async def look_at(settings: BenchSettings, seed: int) -> Endpoint:
    """Find out how to load an endpoint.

    Args:
        settings: those of the run.
        seed: of its prompts.

    Raises:
        ConfigError: the CA's file or the key can't be used.
        UnavailableError: it can't be reached, or serves nothing.
        DiptychError: it refuses.
    """
    url = settings.url.rstrip("/").removesuffix("/v1")
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        # Found here, as an error of the HTTP library would show the key.
        raise ConfigError("--api-key has characters that no header can carry, such as a space.")
    target = Target(
        url=url,
        model=settings.model or "",
        chat=settings.chat,
        timeout_s=settings.timeout_s,
        api_key=key,
        ca=settings.ca,
    )
    async with target.client() as http:
        card = await _model(http, settings.model)
        target = replace(target, model=str(card["id"]))
        ids = () if settings.chat or settings.text else await _token_ids(http, target.model)
        prompts = Prompts(seed=seed, ids=ids, shared_tokens=settings.shared_prefix_tokens)
        target, first = await _fields(http, target, prompts, settings)
        notes = []
        if settings.ignore_eos and not target.exact:
            notes.append(
                "The endpoint does not take ignore_eos: outputs end where the model likes."
            )
        if first.prompt_tokens is None:
            notes.append("The endpoint reports no usage: tokens are counted as events.")
        if not ids:
            prompts = await _measured_words(http, target, prompts)
            notes.append("Prompts are text: their lengths are near what was asked, not exact.")
        length = card.get("max_model_len")
        return Endpoint(
            target=target,
            prompts=prompts,
            software=card.get("owned_by"),
            version=await _version(http),
            max_model_len=length if isinstance(length, int) else None,
            notes=tuple(notes),
        )


async def _model(http: httpx.AsyncClient, wanted: str | None) -> dict[str, Any]:
    """The card of the wanted model, or of the first; only its id if there are no cards."""
    try:
        answer = await http.get("/v1/models", timeout=_ANSWER_S)
    except (httpx.HTTPError, OSError) as error:
        raise _unreachable(http, repr(error)) from None
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url is not a URL: {error}.") from None
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise _refused(f"HTTP {answer.status_code}", "")
    try:
        cards = {str(card["id"]): dict(card) for card in answer.json()["data"]}
    except (ValueError, LookupError, TypeError):
        cards = {}
    if wanted is not None:
        return cards.get(wanted, {"id": wanted})
    if not cards:
        raise UnavailableError(
            f"{http.base_url} names no model that it serves (HTTP {answer.status_code} from "
            f"/v1/models: {reason(answer.content)}). Is it OpenAI-compatible, and ready?"
        )
    return next(iter(cards.values()))


async def _token_ids(http: httpx.AsyncClient, model: str) -> tuple[int, ...]:
    """Ids that the model surely has; none if the endpoint does not tokenize."""
    body = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
    for path in ("/v1/tokenize", "/tokenize"):
        try:
            answer = await http.post(path, json=body, timeout=_ANSWER_S)
            if answer.status_code == httpx.codes.OK:
                return tuple(sorted({int(each) for each in answer.json()["tokens"]}))
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            continue
    return ()


async def _fields(
    http: httpx.AsyncClient, target: Target, prompts: Prompts, settings: BenchSettings
) -> tuple[Target, Outcome]:
    """The target with the first fields that it takes, and what came of asking with them."""
    forms = [
        {name: value for name, value in form.items() if settings.ignore_eos or name != "ignore_eos"}
        for form in _FIELDS
    ]
    outcome = Outcome()
    for form in forms:
        fields = form | {"temperature": settings.temperature}
        probed = replace(target, fields=fields, exact="ignore_eos" in form)
        outcome = await _probe(http, probed, prompts, _FEW_WORDS)
        if outcome.cause not in _UNKNOWN_FIELD:
            break
    if outcome.cause in (NO_CONNECTION, BROKEN, TIMEOUT):
        raise _unreachable(http, outcome.detail)
    if outcome.cause.startswith("HTTP "):
        raise _refused(outcome.cause, outcome.detail)
    return probed, outcome


async def _measured_words(http: httpx.AsyncClient, target: Target, prompts: Prompts) -> Prompts:
    """How many tokens words and template take, by two prompts of different length."""
    few = await _probe(http, target, prompts, _FEW_WORDS)
    more = await _probe(http, target, prompts, _MORE_WORDS)
    if few.prompt_tokens is None or more.prompt_tokens is None:
        return prompts
    per_word = (more.prompt_tokens - few.prompt_tokens) / (_MORE_WORDS - _FEW_WORDS)
    if per_word <= 0:
        return prompts
    frame = few.prompt_tokens - per_word * _FEW_WORDS
    return replace(prompts, tokens_per_word=per_word, frame_tokens=frame)


async def _probe(http: httpx.AsyncClient, target: Target, prompts: Prompts, length: int) -> Outcome:
    # Not of the shared prefix: what is measured must find it as cold as it is.
    plain = replace(prompts, shared_tokens=0)
    arrival = Arrival(number=-length, prompt_tokens=length, output_tokens=_PROBE_TOKENS)
    now = time.monotonic()
    return await ask(http, target.asked(plain.write(arrival), _PROBE_TOKENS), due=now, begin=now)


async def _version(http: httpx.AsyncClient) -> str | None:
    """As vLLM and SGLang say it, and by the OpenAPI document, as ours does."""
    for path, place in (
        ("/version", ("version",)),
        ("/get_server_info", ("version",)),
        ("/openapi.json", ("info", "version")),
    ):
        try:
            found = (await http.get(path, timeout=_ANSWER_S)).json()
            for name in place:
                found = found[name]
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            continue
        return str(found)
    return None


def _unreachable(http: httpx.AsyncClient, why: str) -> UnavailableError:
    if "CERTIFICATE_VERIFY_FAILED" in why:
        return UnavailableError(
            f"The certificate of {http.base_url} is not from a CA that is trusted here. Name the "
            "file of its CA with --ca."
        )
    return UnavailableError(
        f"{http.base_url} can't be asked: {why}. Start it with `diptych serve`, or name another "
        "endpoint with --url."
    )


def _refused(status: str, why: str) -> DiptychError:
    if status == "HTTP 401":
        return DiptychError(
            "The endpoint asks for an API key, or does not know this one (HTTP 401): give "
            "--api-key, or DIPTYCH_BENCH_API_KEY in the environment."
        )
    return DiptychError(f"The endpoint refuses a small request ({status}): {why or 'no reason'}")
