"""The body of POST /generate, and the completion that it amounts to."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema

from core.errors import InvalidRequestError
from router.api.fields import Strict, wrong
from router.api.parsing import known_fields, validate
from router.api.requests import (
    BIASES_SCHEMA,
    STOPS_SCHEMA,
    CompletionRequest,
    Name,
    SamplingFields,
    StopIds,
    parse_prompts,
)
from router.api.structured import GrammarField, RegexField, SchemaField

MAX_NEW_TOKENS = 128
"""Limit of an output where the client sets none. Source: SGLang's default."""

_UNSERVED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "audio_data": (),
        "bootstrap_host": (),
        "bootstrap_port": (),
        "bootstrap_room": (),
        "custom_logit_processor": (),
        "data_parallel_rank": (),
        "image_data": (),
        "input_embeds": (),
        "log_metrics": (True,),
        "lora_id": (),
        "lora_path": (),
        "modalities": (),
        "priority": (0,),
        "return_hidden_states": (False,),
        "return_text_in_logprobs": (False,),
        "session_params": (),
        "token_ids_logprob": (),
        "video_data": (),
    }
)
_UNSERVED_SAMPLING: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "custom_params": (),
        "spaces_between_special_tokens": (True,),
        "stop_regex": (),
        "stream_interval": (),
        "structural_tag": (),
    }
)


class NativeSampling(Strict):
    """Field `sampling_params`."""

    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[Any, WithJsonSchema(BIASES_SCHEMA)] = None
    stop: Annotated[Any, WithJsonSchema(STOPS_SCHEMA)] = None
    stop_token_ids: StopIds = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None
    n: int = Field(default=1, ge=1)
    json_schema: SchemaField = None
    regex: RegexField = None
    ebnf: GrammarField = None


_OWN_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
}


def _sampling(value: Any) -> tuple[NativeSampling, ...]:
    """Settings of all prompts, or of each."""
    if isinstance(value, list) and value:
        if len(value) > MAX_NAMES:
            raise wrong(f"takes at most {MAX_NAMES} entries")
        return tuple(_one_sampling(one, f"sampling_params[{i}].") for i, one in enumerate(value))
    return (_one_sampling(value, "sampling_params."),)


def _one_sampling(value: Any, where: str) -> NativeSampling:
    if not isinstance(value, dict):
        raise wrong("must be an object or a list of objects")
    fields = known_fields(value, NativeSampling, _UNSERVED_SAMPLING, where=where)
    sampling = validate(NativeSampling, fields, where=where)
    validate(SamplingFields, _by_own_names(sampling), where=where)
    return sampling


def _by_own_names(sampling: NativeSampling) -> dict[str, Any]:
    """The fields that SamplingFields knows, as it names them."""
    named = {_OWN_NAMES.get(name, name): value for name, value in sampling if value is not None}
    return {name: value for name, value in named.items() if name in SamplingFields.model_fields}


_NAME_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 128}
MAX_NAMES = 1024
NAMES_SCHEMA = {
    "anyOf": [_NAME_SCHEMA, {"type": "array", "items": _NAME_SCHEMA, "maxItems": MAX_NAMES}]
}


def parse_names(value: Any) -> tuple[str, ...]:
    """One name or several."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and len(names) > MAX_NAMES:
        raise wrong(f"takes at most {MAX_NAMES} names")
    if not isinstance(names, list) or not all(
        isinstance(name, str) and 0 < len(name) <= 128 for name in names
    ):
        raise wrong("must be a string of 1 to 128 characters, or a list of such")
    return tuple(names)


_SAMPLING_SCHEMA = {
    "anyOf": [
        NativeSampling.model_json_schema(ref_template="#/components/schemas/{model}"),
        {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": MAX_NAMES},
    ]
}


class NativeBody(Strict):
    """Body of POST /generate."""

    model: Name | None = None
    text: Annotated[tuple[str, ...], PlainValidator(parse_prompts)] | None = None
    input_ids: Annotated[tuple[tuple[int, ...], ...], PlainValidator(parse_prompts)] | None = None
    sampling_params: Annotated[
        tuple[NativeSampling, ...], PlainValidator(_sampling), WithJsonSchema(_SAMPLING_SCHEMA)
    ] = (NativeSampling(),)
    rid: Annotated[tuple[str, ...], PlainValidator(parse_names), WithJsonSchema(NAMES_SCHEMA)] = ()
    return_logprob: bool = False
    top_logprobs_num: int = 0
    logprob_start_len: int = Field(default=-1, ge=-1)
    """Position from which the prompt's logprobs are reported too; -1 for none of them."""
    stream: bool = False
    extra_key: str = Field(default="", max_length=256)


class NativeRequest(CompletionRequest):
    """The completion that a body amounts to."""

    limit_field: ClassVar[str] = "max_new_tokens"
    scores_field: ClassVar[str] = "logprob_start_len"

    batch: bool
    """The answer is a list, one entry per prompt and choice."""
    rids: tuple[str, ...]
    """The client's names of the prompts, one each or none."""
    scores_from: int | None = None
    """Position of the first prompt token whose logprob is reported."""
    each: tuple["NativeRequest", ...] = ()
    """What is asked for each prompt, where they differ in it."""


def read_native(data: Mapping[str, Any]) -> NativeRequest:
    """Check the fields of a body.

    Raises:
        InvalidRequestError: names the first field that is wrong.
    """
    body = validate(NativeBody, known_fields(data, NativeBody, _UNSERVED))
    field = "text" if body.text is not None else "input_ids"
    prompts = body.text if body.text is not None else body.input_ids
    if prompts is None or (body.text is not None and body.input_ids is not None):
        raise InvalidRequestError("Send text or input_ids, one of them.", param="text")
    wanted = str if field == "text" else tuple
    if not all(isinstance(prompt, wanted) for prompt in prompts):
        raise InvalidRequestError(
            f"{field} must be {'text' if field == 'text' else 'token ids'} or a list of it.",
            param=field,
        )
    if body.rid and len(body.rid) != len(prompts):
        raise InvalidRequestError(
            f"rid has {len(body.rid)} names for {len(prompts)} prompts.", param="rid"
        )
    if body.top_logprobs_num and not body.return_logprob:
        raise InvalidRequestError(
            "top_logprobs_num needs return_logprob to be true.", param="top_logprobs_num"
        )
    if body.logprob_start_len >= 0 and not body.return_logprob:
        raise InvalidRequestError(
            "logprob_start_len needs return_logprob to be true.", param="logprob_start_len"
        )
    if len(body.sampling_params) not in (1, len(prompts)):
        raise InvalidRequestError(
            f"sampling_params has {len(body.sampling_params)} entries for {len(prompts)} prompts.",
            param="sampling_params",
        )
    if len({sampling.n for sampling in body.sampling_params}) > 1:
        raise InvalidRequestError("n must be the same for all prompts.", param="sampling_params")
    several = isinstance(data[field], list) and (
        field == "text" or isinstance(data[field][0], list)
    )
    first, *others = [
        _completion(body, sampling, prompts, batch=several or sampling.n > 1)
        for sampling in body.sampling_params
    ]
    return first.model_copy(update={"each": (first, *others)}) if others else first


def _completion(
    body: NativeBody, sampling: NativeSampling, prompts: tuple[Any, ...], *, batch: bool
) -> NativeRequest:
    scored = body.return_logprob and body.logprob_start_len >= 0
    checked = SamplingFields(**_by_own_names(sampling))
    return NativeRequest.model_construct(
        **{name: getattr(checked, name) for name in SamplingFields.model_fields}
        | {"model": body.model, "stream": body.stream, "extra_key": body.extra_key},
        prompt=prompts,
        n=sampling.n,
        json_schema=sampling.json_schema,
        regex=sampling.regex,
        ebnf=sampling.ebnf,
        max_tokens=sampling.max_new_tokens,
        logprobs=body.top_logprobs_num if body.return_logprob else None,
        prompt_logprobs=body.top_logprobs_num if scored else None,
        scores_from=body.logprob_start_len if scored else None,
        return_token_ids=True,
        batch=batch,
        rids=body.rid,
    )
