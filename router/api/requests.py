"""The request bodies that this server takes: fields, types, and what is known but not served.

Ranges of sampling settings are checked by core.sampling.SamplingParams, which knows them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from router.api.fields import Strict, at_most, wrong
from router.api.messages import Message, parse_messages
from router.api.parsing import Parsed, known_fields, validate
from router.api.structured import StructureFields
from router.api.tools import (
    MAX_TOOLS,
    TOOL_CHOICE_SCHEMA,
    Tool,
    ToolChoice,
    call_constraint,
    parse_tool_choice,
    parse_tools,
)
from router.api.unserved import UNSERVED

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIASES = 4096
MAX_KWARGS = 64
MAX_DETOKENIZED = 1 << 20
MAX_NAME_CHARS = 512
"""Longest name of a model, a user or the like."""

Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
StopIds = Annotated[list[int], FailFast(), Field(max_length=MAX_STOP_IDS)]


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or _types_in(stops) - {str}:
        raise wrong("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise wrong(f"takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong("must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise wrong(f"takes at most {MAX_BIASES} token ids")
    biases = {}
    for token_id, bias in value.items():
        if not token_id.isascii() or not token_id.isdigit() or len(token_id) > 10:
            raise wrong(f"keys must be token ids, not {token_id[:32]!r}")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong(f"values must be numbers, not that of {token_id}")
        biases[int(token_id)] = float(bias)
    return biases


def _types_in(values: list[Any]) -> set[type]:
    """Of JSON values. There may be millions, so they are looked at without a line of Python."""
    return set(map(type, values))


def parse_prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each text or token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        types = _types_in(value)
        if types == {int}:
            return (tuple(value),)
        if types == {str}:
            return tuple(value)
        if types == {list} and all(_types_in(item) <= {int} for item in value):
            return tuple(tuple(item) for item in value)
    raise wrong("must be a string, a list of strings, a list of token ids or a list of such lists")


_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
STOPS_SCHEMA = {
    "anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS}]
}
BIASES_SCHEMA = {
    "type": "object",
    "patternProperties": {"^[0-9]{1,10}$": {"type": "number", "minimum": -100, "maximum": 100}},
    "additionalProperties": False,
    "maxProperties": MAX_BIASES,
}
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


def _stream_options(value: Any) -> Any:
    if not isinstance(value, dict):
        raise wrong("must be an object")
    fields = known_fields(
        value, StreamOptions, {"include_obfuscation": (False,)}, where="stream_options."
    )
    return validate(StreamOptions, fields, where="stream_options.")


class SamplingFields(Strict):
    """What every endpoint that generates takes under the same names."""

    model: Name | None = None
    stream: bool = False
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[
        dict[int, float], PlainValidator(_biases), WithJsonSchema(BIASES_SCHEMA)
    ] = Field(default_factory=dict)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops), WithJsonSchema(STOPS_SCHEMA)] = ()
    stop_token_ids: StopIds = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    no_stop_trim: bool = False
    """Another name of the one before."""
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    """Taken for what it hints at: placement goes by the prompt itself."""
    cache_salt: str = Field(default="", max_length=256)
    extra_key: str = Field(default="", max_length=256)
    """A second salt."""


class GenerateRequest(SamplingFields, StructureFields):
    """What chats and completions share."""

    limit_field: ClassVar[str] = "max_tokens"
    """Name of the field that limits the output."""
    scores_field: ClassVar[str] = "prompt_logprobs"
    """Name of the field that asks for log probabilities of the prompt."""

    stream_options: Annotated[StreamOptions, BeforeValidator(_stream_options)] = StreamOptions()
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    rid: str | None = Field(default=None, max_length=128)
    """A name of the client's own, for /abort_request."""


class Effort(Strict):
    """How hard to think, where the chat template knows of it."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ConversationFields(Effort):
    """How a conversation becomes a prompt."""

    messages: Annotated[tuple[Message, ...], BeforeValidator(parse_messages), Field(min_length=1)]
    tools: Annotated[
        tuple[Tool, ...], BeforeValidator(parse_tools), Field(max_length=MAX_TOOLS)
    ] = ()
    tool_choice: Annotated[
        ToolChoice, PlainValidator(parse_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = ToolChoice("auto")
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[
        dict[str, Any], at_most(MAX_KWARGS), Field(max_length=MAX_KWARGS)
    ] = Field(default_factory=dict)
    add_special_tokens: bool = False

    @property
    def generation_prompt(self) -> bool:
        """Whether the prompt ends with the header of a new message; unless one is continued."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The functions that the model is told of."""
        return () if self.tool_choice.mode == "none" else self.tools


class ChatRequest(GenerateRequest, ConversationFields):
    """Body of POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    logprobs: bool = False
    top_logprobs: int | None = None

    @property
    def structured(self) -> StructuredOutput | None:
        """What the output must be: what a field says, or calls where they are required.

        Raises:
            InvalidRequestError: two fields say so, or one does where a call is required.
        """
        asked = super().structured
        if not self.tool_choice.forced:
            return asked
        if asked is not None:
            raise InvalidRequestError(
                "An output that must call functions can't have another structure; leave "
                "tool_choice or the structure out.",
                param="tool_choice",
            )
        return call_constraint(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)


class CompletionRequest(GenerateRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        tuple[str | tuple[int, ...], ...],
        PlainValidator(parse_prompts),
        WithJsonSchema(_PROMPTS_SCHEMA),
    ]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


TextRequest = ChatRequest | CompletionRequest


class TokenizeTextRequest(Strict):
    """Body of POST /tokenize with a prompt."""

    model: Name | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ConversationFields):
    """Body of POST /tokenize with messages."""

    model: Name | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[int], FailFast(), Field(max_length=MAX_DETOKENIZED)]
    skip_special_tokens: bool = False


def read(model: type[Parsed], data: Mapping[str, Any]) -> Parsed:
    """Check a body against one of the requests above.

    Raises:
        InvalidRequestError: names the first field that is wrong.
    """
    return validate(model, known_fields(data, model, UNSERVED))
