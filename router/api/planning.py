"""Turns a request that was read into its sequences: tokenizes, checks, and plans each of them."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import InvalidRequestError
from core.sampling import SamplingParams
from router.access.caller import Caller
from router.admission import Priority
from router.api.caller import caller_key, priority_of
from router.api.choice import Choice, Prompt
from router.api.exchange import Exchange
from router.api.job import Dialect, Job
from router.api.output import Output, OutputRules
from router.api.parts import ApiParts
from router.api.prompt_scores import PromptScores, check_size
from router.api.requests import CompletionRequest, TextRequest
from router.api.sampling import (
    check_token_ids,
    choice_seed,
    output_limit,
    sampling_params,
    wanted_logprobs,
    wanted_prompt_logprobs,
    wanted_tokens,
)
from router.generation import GenerationRequest, ServedModel
from telemetry.trace_context import TraceContext


async def make_job(
    parts: ApiParts, dialect: Dialect, request: TextRequest, exchange: Exchange, deadline: float
) -> Job:
    """Tokenize a request and plan its sequences.

    Raises:
        InvalidRequestError: the request can't be served as it is.
        UnavailableError: no worker has said yet what it serves.
    """
    model = parts.model(request.model, exchange.caller)
    if not request.stream and "stream_options" in request.model_fields_set:
        raise InvalidRequestError(
            "stream_options is only for streams; set stream to true or leave it out.",
            param="stream_options",
        )
    # Refused before the work of tokenizing.
    priority = priority_of(exchange.caller, exchange.headers)
    wanted_tokens(request)
    wanted_prompt_logprobs(request)
    _check_choices(request, parts.settings.max_choices)
    _check_ids(request, model, dialect.prompt_field)
    prompts = await dialect.prompts(request, parts.text, model.max_model_len)
    token_ids = [prompt.token_ids for prompt in prompts]
    check_size(token_ids, wanted_prompt_logprobs(request), request.n)
    unique = uuid.uuid4().hex if exchange.identity.client_gave_id else exchange.request_id
    planner = _Planner(
        parts=parts,
        dialect=dialect,
        request=request,
        model=model,
        answer_id=f"{dialect.id_prefix}{unique}",
        received_at=exchange.received_at,
        trace=exchange.identity.trace,
        tokenized_at=parts.clock(),
        deadline=deadline,
        caller=exchange.caller,
        key=caller_key(exchange.caller, exchange.headers, request.user),
        priority=priority,
    )
    choices = await parts.bodies.beside(exchange.body_bytes, lambda: planner.choices(prompts))
    return Job(request=request, prompts=prompts, choices=choices, answer_id=planner.answer_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """What the sequences of a request have in common."""

    parts: ApiParts
    dialect: Dialect
    request: TextRequest
    model: ServedModel
    answer_id: str
    received_at: float
    trace: TraceContext | None
    tokenized_at: float
    deadline: float
    caller: Caller
    key: str
    priority: Priority

    def choices(self, prompts: Sequence[Prompt]) -> list[Choice]:
        """All of them, in order."""
        return [choice for i, prompt in enumerate(prompts) for choice in self._of_prompt(prompt, i)]

    def _of_prompt(self, prompt: Prompt, place: int) -> list[Choice]:
        request, field = prompt.request or self.request, self.dialect.prompt_field
        if not prompt.token_ids:
            raise InvalidRequestError(f"{field} is empty: it has no tokens.", param=field)
        check_token_ids(prompt.token_ids, self.model, field)
        configured = self.parts.settings.completion_max_tokens
        limit = output_limit(
            wanted_tokens(request),
            self.dialect.default_max_tokens(configured),
            prompt_tokens=len(prompt.token_ids),
            model=self.model,
            param=field,
        )
        structured = self.dialect.structure(request, self.parts.text)
        prompt_logprobs = wanted_prompt_logprobs(request)
        scores = None if prompt_logprobs is None else PromptScores()
        return [
            self._copy(
                prompt,
                place * self.request.n + copy,
                copy,
                sampling_params(
                    request,
                    max_tokens=max(1, limit),
                    seed=choice_seed(request.seed, copy),
                    model=self.model,
                    structured=structured,
                    prompt_logprobs=prompt_logprobs if copy == 0 else None,
                ),
                scores,
                discard=limit == 0,
            )
            for copy in range(self.request.n)
        ]

    def _copy(
        self,
        prompt: Prompt,
        index: int,
        copy: int,
        sampling: SamplingParams,
        scores: PromptScores | None,
        *,
        discard: bool,
    ) -> Choice:
        request = prompt.request or self.request
        parser = self.dialect.parser(request, prompt, self.parts.text)
        detokeniser = self.parts.text.detokeniser(
            skip_special_tokens=request.skip_special_tokens,
            show_markers=parser is not None,
            context=prompt.token_ids if prompt.continued else (),
        )
        return Choice(
            index=index,
            prompt=prompt,
            request=GenerationRequest(
                request_id=f"{self.answer_id}-{index}",
                prompt_ids=prompt.token_ids,
                sampling=sampling,
                deadline=self.deadline,
                received_at=self.received_at,
                tokenized_at=self.tokenized_at,
                cache_salt=self.parts.salt.of(self.caller.tenant, _salt(request)),
                key=self.key,
                priority=self.priority,
                trace=self.trace,
                shares_prompt_with=f"{self.answer_id}-{index - copy}" if copy else None,
            ),
            output=Output(
                detokeniser,
                self._rules(request, discard=discard),
                parser=parser,
                offset=len(prompt.echo),
            ),
            scores=scores,
        )

    def _rules(self, request: TextRequest, *, discard: bool) -> OutputRules:
        eos_ids = frozenset[int]() if request.ignore_eos else frozenset(self.model.eos_token_ids)
        return OutputRules(
            stops=request.stop,
            include_stop=request.include_stop_str_in_output or request.no_stop_trim,
            stop_ids=eos_ids.union(request.stop_token_ids),
            eos_ids=eos_ids,
            min_tokens=request.min_tokens,
            logprobs=wanted_logprobs(request) is not None,
            token_ids=request.return_token_ids,
            discard=discard,
        )


def _check_choices(request: TextRequest, most: int) -> None:
    prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
    if prompts * request.n > most:
        raise InvalidRequestError(
            f"{prompts} prompts with n={request.n} make {prompts * request.n} choices; this server "
            f"takes at most {most} in one request.",
            param="n",
        )


def _check_ids(request: TextRequest, model: ServedModel, param: str) -> None:
    """Refuse token ids beyond the context before anything is done with them."""
    prompts = request.prompt if isinstance(request, CompletionRequest) else ()
    for prompt in prompts:
        if not isinstance(prompt, str) and len(prompt) > model.max_model_len:
            output_limit(0, None, prompt_tokens=len(prompt), model=model, param=param)


def _salt(request: TextRequest) -> str:
    if not request.extra_key:
        return request.cache_salt
    # The length keeps pairs apart whose texts join to the same.
    return f"{len(request.cache_salt)}:{request.cache_salt}{request.extra_key}"
