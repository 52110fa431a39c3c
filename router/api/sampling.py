"""From the fields of a request to the sampling settings of each of its sequences."""

import random
from collections.abc import Collection

import xxhash

from core.errors import ErrorCode, InvalidRequestError
from core.sampling import MAX_LOGPROBS, SamplingParams, StructuredOutput
from router.api.requests import ChatRequest, CompletionRequest, GenerateRequest, TextRequest
from router.generation import ServedModel


def choice_seed(seed: int | None, choice: int) -> int:
    """Seed of the i-th of n choices, in [0, 2**64).

    The first choice has the request's own seed, so that asking for more choices leaves it as it
    was; without a seed each is random.
    """
    if seed is None:
        return random.getrandbits(64)
    seed %= 2**64
    if choice == 0:
        return seed
    return xxhash.xxh3_64_intdigest(choice.to_bytes(4, "little"), seed=seed)


def wanted_tokens(request: GenerateRequest) -> int | None:
    """The limit that the client set on the output, under either of its names.

    Raises:
        InvalidRequestError: both names, two values; or a limit below 1, with echo below 0.
    """
    name, limit = request.limit_field, request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        if limit not in (None, request.max_completion_tokens):
            raise InvalidRequestError(
                f"max_tokens ({limit}) and max_completion_tokens "
                f"({request.max_completion_tokens}) differ; send one of them.",
                param="max_completion_tokens",
            )
        name, limit = "max_completion_tokens", request.max_completion_tokens
    # A completion of no tokens is of use for its prompt.
    least = 0 if isinstance(request, CompletionRequest) and request.echo else 1
    if limit is not None and limit < least:
        raise InvalidRequestError(f"{name} must be at least {least}, got {limit}.", param=name)
    return limit


def output_limit(
    wanted: int | None, default: int | None, *, prompt_tokens: int, model: ServedModel, param: str
) -> int:
    """How many tokens may be generated after a prompt.

    Args:
        wanted: the client's limit.
        default: limit when the client set none; None for the rest of the context.
        prompt_tokens: length of the prompt.
        model: says how long the context is.
        param: field that holds the prompt.

    Raises:
        InvalidRequestError: prompt and output do not fit; the message says both lengths.
    """
    room = model.max_model_len - prompt_tokens
    if room < 1:
        # Of one that is far too long not all was encoded.
        at_least = "at least " if prompt_tokens > 2 * model.max_model_len else ""
        raise InvalidRequestError(
            f"The prompt is {at_least}{prompt_tokens} tokens long, but the model's context is "
            f"{model.max_model_len} tokens, of which at least one must be left for the output; "
            "shorten the prompt.",
            param=param,
            code=ErrorCode.CONTEXT_LENGTH,
        )
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise InvalidRequestError(
            f"The prompt is {prompt_tokens} tokens long and {wanted} tokens of output were asked "
            f"for, {prompt_tokens + wanted} together, but the model's context is "
            f"{model.max_model_len} tokens; shorten the prompt or ask for at most {room}.",
            param=param,
            code=ErrorCode.CONTEXT_LENGTH,
        )
    return wanted


def wanted_logprobs(request: TextRequest) -> int | None:
    """How many alternatives to report per token; None for no logprobs at all.

    Raises:
        InvalidRequestError: out of range, or top_logprobs without logprobs.
    """
    if isinstance(request, CompletionRequest):
        name, count = "logprobs", request.logprobs
    elif request.logprobs:
        name, count = "top_logprobs", request.top_logprobs or 0
    elif request.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    else:
        return None
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"{name} must be in [0, {MAX_LOGPROBS}], got {count}.", param=name
        )
    return count


def wanted_prompt_logprobs(request: TextRequest) -> int | None:
    """How many alternatives to report per prompt token; None for no logprobs of the prompt.

    Raises:
        InvalidRequestError: out of range, or of a stream.
    """
    field, count = request.scores_field, request.prompt_logprobs
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"prompt_logprobs must be in [0, {MAX_LOGPROBS}], got {count}.", param="prompt_logprobs"
        )
    if count is not None and request.stream:
        raise InvalidRequestError(
            f"{field} is not available in a stream; set stream to false or leave it out.",
            param=field,
        )
    if isinstance(request, CompletionRequest) and request.echo:
        echoed = wanted_logprobs(request)
        return max((each for each in (count, echoed) if each is not None), default=None)
    return count


def sampling_params(
    request: TextRequest,
    *,
    max_tokens: int,
    seed: int,
    model: ServedModel,
    structured: StructuredOutput | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Sampling settings of one sequence.

    Args:
        request: what was asked for.
        max_tokens: limit of the output.
        seed: of this sequence.
        model: says which token ids there are.
        structured: what the output must be, from the request and what its model can do.
        prompt_logprobs: what this sequence reports of the prompt.

    Raises:
        InvalidRequestError: a value is out of range; names the field.
    """
    check_token_ids(request.stop_token_ids, model, "stop_token_ids")
    check_token_ids(request.logit_bias, model, "logit_bias")
    if request.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens ({request.min_tokens}) is above the output's limit of {max_tokens}.",
            param="min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        # -1 is how other servers say "all". A larger k than the vocabulary would not fit the wire.
        top_k=0 if request.top_k == -1 else min(request.top_k, model.vocab_size),
        min_p=request.min_p,
        seed=seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        logprobs=wanted_logprobs(request),
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        structured=structured,
    )


def check_token_ids(token_ids: Collection[int], model: ServedModel, param: str) -> None:
    """Refuse ids that the model does not have.

    Raises:
        InvalidRequestError: names such an id.
    """
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequestError(
                f"{param} has token id {token_id}, but the model's ids are 0 to "
                f"{model.vocab_size - 1}.",
                param=param,
            )
