"""A checked request for text: its prompts, its sequences and the shape of its answer.

A dialect is what chats and completions do differently; everything else is written once, here and in
router/api/generate.py.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.errors import InvalidRequestError
from router.admission import Priority
from router.api.answers import Answer, Usage
from router.api.caller import caller_key, priority_of
from router.api.exchange import Exchange
from router.api.output import Output, OutputRules
from router.api.parts import ApiParts
from router.api.requests import ChatRequest, CompletionRequest
from router.api.sampling import (
    check_token_ids,
    choice_seed,
    output_limit,
    sampling_params,
    wanted_tokens,
)
from router.generation import GenerationRequest, ServedModel
from router.text.processor import TextProcessor

TextRequest = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, ready to run."""

    token_ids: Sequence[int]
    echo: str = ""
    """Text that comes before the output in the answer."""
    continued: bool = False
    """True if the output goes on with the prompt's own text instead of starting a new one."""


class Dialect(Protocol):
    """What one of the two endpoints does its own way."""

    name: str
    """Label of its metrics."""
    id_prefix: str
    prompt_field: str
    """Field that errors about the prompt name."""
    answer: type[Answer]

    def read(self, data: Mapping[str, Any]) -> TextRequest:
        """Check the fields of a body.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        ...

    async def prompts(self, request: TextRequest, text: TextProcessor) -> list[Prompt]:
        """Make the prompts of a request that `read` returned."""
        ...

    def default_max_tokens(self, configured: int) -> int | None:
        """The output's limit where the client set none; None for the rest of the context."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sequence of a request."""

    index: int
    prompt: Prompt
    request: GenerationRequest
    output: Output


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that passed every check."""

    request: TextRequest
    prompts: Sequence[Prompt]
    choices: Sequence[Choice]
    answer_id: str

    def usage(self) -> Usage:
        """What the whole request has used so far."""
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=sum(choice.output.num_tokens for choice in self.choices),
            cached_tokens=self._cached_tokens(),
        )

    def prompt_ids(self, choice: Choice) -> Sequence[int] | None:
        """The prompt's ids, if the client wants to see ids."""
        return choice.prompt.token_ids if self.request.return_token_ids else None

    def mode(self) -> str:
        """How the sequences were served, as far as it is known."""
        ends = (choice.output.end for choice in self.choices)
        return ",".join(sorted({end.mode for end in ends if end is not None and end.mode}))

    def _cached_tokens(self) -> int | None:
        """Of each prompt, what the luckiest of its choices found; None if that is not known."""
        total = 0
        for prompt in self.prompts:
            ends = [choice.output.end for choice in self.choices if choice.prompt is prompt]
            known = [end.cached_tokens for end in ends if end is not None]
            if not known:
                return None
            total += max(known)
        return total


async def make_job(
    parts: ApiParts, dialect: Dialect, request: TextRequest, exchange: Exchange, deadline: float
) -> Job:
    """Tokenize a request and plan its sequences.

    Raises:
        InvalidRequestError: the request can't be served as it is.
        UnavailableError: no worker has said yet what it serves.
    """
    model = parts.model(request.model)
    if not request.stream and "stream_options" in request.model_fields_set:
        raise InvalidRequestError(
            "stream_options is only for streams; set stream to true or leave it out.",
            param="stream_options",
        )
    wanted_tokens(request)  # refused before the work of tokenizing
    prompts = await dialect.prompts(request, parts.text)
    if len(prompts) * request.n > parts.settings.max_choices:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with n={request.n} make {len(prompts) * request.n} choices; "
            f"this server takes at most {parts.settings.max_choices} in one request.",
            param="n",
        )
    unique = uuid.uuid4().hex if exchange.client_gave_id else exchange.request_id
    planner = _Planner(
        parts=parts,
        dialect=dialect,
        request=request,
        model=model,
        answer_id=f"{dialect.id_prefix}-{unique}",
        received_at=exchange.received_at,
        tokenized_at=parts.clock(),
        deadline=deadline,
        key=caller_key(exchange.headers, request.user),
        priority=priority_of(exchange.headers),
    )
    choices = [
        planner.choice(prompt, index, copy)
        for index, (prompt, copy) in enumerate(
            (prompt, copy) for prompt in prompts for copy in range(request.n)
        )
    ]
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
    tokenized_at: float
    deadline: float
    key: str
    priority: Priority

    def choice(self, prompt: Prompt, index: int, copy: int) -> Choice:
        request, field = self.request, self.dialect.prompt_field
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
        sampling = sampling_params(
            request, max_tokens=limit, seed=choice_seed(request.seed, copy), model=self.model
        )
        detokeniser = self.parts.text.detokeniser(
            skip_special_tokens=request.skip_special_tokens,
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
                cache_salt=request.cache_salt,
                key=self.key,
                priority=self.priority,
            ),
            output=Output(detokeniser, self._rules(), offset=len(prompt.echo)),
        )

    def _rules(self) -> OutputRules:
        request = self.request
        eos_ids = frozenset[int]() if request.ignore_eos else frozenset(self.model.eos_token_ids)
        return OutputRules(
            stops=request.stop,
            include_stop=request.include_stop_str_in_output,
            stop_ids=eos_ids.union(request.stop_token_ids),
            eos_ids=eos_ids,
            min_tokens=request.min_tokens,
            logprobs=request.logprobs not in (None, False),
            token_ids=request.return_token_ids,
        )
