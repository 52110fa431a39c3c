"""The body of POST /v1/responses, and the chat that it amounts to."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from router.api.fields import at_most, wrong
from router.api.messages import MAX_MESSAGES, Message
from router.api.parsing import known_fields, known_names, validate
from router.api.requests import MAX_KWARGS, ChatRequest, Effort, SamplingFields
from router.api.responses import schemas
from router.api.responses.items import messages_of
from router.api.structured import parse_response_format
from router.api.tools import Tool, ToolChoice, parse_tool_choice, parse_tools
from router.api.unserved import UNSERVED as UNSERVED_ANYWHERE

UNSERVED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        **UNSERVED_ANYWHERE,
        "background": (False,),
        "context_management": (),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "prompt": (),
        "prompt_logprobs": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
)
MAX_METADATA = 16


def _input(value: Any) -> str | list[Any]:
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise wrong(f"takes at most {MAX_MESSAGES} items")
    if isinstance(value, str) or (isinstance(value, list) and value):
        return value
    raise wrong("must be a string or a list of at least one item")


def _tools(value: Any) -> tuple[Tool, ...]:
    """Tools in the flat form of this endpoint."""
    if not isinstance(value, list):
        raise wrong("must be a list of tools")
    nested = []
    for item in value:
        if isinstance(item, dict) and item.get("type") == "function":
            function = {key: each for key, each in item.items() if key != "type"}
            nested.append({"type": "function", "function": function})
        else:
            nested.append(item)
    return parse_tools(nested)


def _tool_choice(value: Any) -> ToolChoice:
    if isinstance(value, dict) and value.get("type") == "function" and "name" in value:
        value = {"type": "function", "function": {k: v for k, v in value.items() if k != "type"}}
    return parse_tool_choice(value)


def _text(value: Any) -> StructuredOutput | None:
    """What the text must be; the schema stands a level higher here than in a chat."""
    if not isinstance(value, dict):
        raise wrong("must be an object")
    fields = known_names(value, ("format",), {"verbosity": ("medium",)}, where="text.")
    form = fields.get("format", {"type": "text"})
    if isinstance(form, dict) and form.get("type") == "json_schema":
        schema = {key: each for key, each in form.items() if key != "type"}
        form = {"type": "json_schema", "json_schema": schema}
    return parse_response_format(form)


def _reasoning(value: Any) -> Any:
    if not isinstance(value, dict):
        raise wrong("must be an object")
    # Summaries are never made; "auto" leaves that to the server.
    unserved = {"summary": ("auto",), "generate_summary": ("auto",)}
    return known_names(value, ("effort",), unserved, where="reasoning.").get("effort")


def _stream_options(value: Any) -> Any:
    if value != {"include_obfuscation": False}:
        raise wrong("may only be {include_obfuscation: false}")
    return value


class ResponsesBody(SamplingFields):
    """Body of POST /v1/responses."""

    input: Annotated[str | list[Any], PlainValidator(_input), WithJsonSchema(schemas.INPUT)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool = True
    metadata: Annotated[dict[str, str], at_most(MAX_METADATA), Field(max_length=MAX_METADATA)] = (
        Field(default_factory=dict)
    )
    tools: Annotated[tuple[Tool, ...], BeforeValidator(_tools), WithJsonSchema(schemas.TOOLS)] = ()
    tool_choice: Annotated[
        ToolChoice, PlainValidator(_tool_choice), WithJsonSchema(schemas.CHOICE)
    ] = ToolChoice("auto")
    parallel_tool_calls: bool = True
    reasoning: Annotated[
        str | None, PlainValidator(_reasoning), WithJsonSchema(schemas.REASONING)
    ] = None
    """How hard to think."""
    text: Annotated[
        StructuredOutput | None, PlainValidator(_text), WithJsonSchema(schemas.TEXT)
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], at_most(MAX_KWARGS), Field(max_length=MAX_KWARGS)
    ] = Field(default_factory=dict)
    stream_options: Annotated[
        Any, PlainValidator(_stream_options), WithJsonSchema(schemas.STREAM_OPTIONS)
    ] = None


class ResponsesRequest(ChatRequest):
    """The chat that a body amounts to."""

    limit_field: ClassVar[str] = "max_output_tokens"

    body: ResponsesBody
    """What the client sent."""


def read_body(data: Mapping[str, Any]) -> ResponsesBody:
    """Check the fields of a body.

    Raises:
        InvalidRequestError: names the first field that is wrong.
    """
    return validate(ResponsesBody, known_fields(data, ResponsesBody, UNSERVED))


def as_chat(body: ResponsesBody, earlier: Sequence[Message]) -> ResponsesRequest:
    """The chat of a body that goes on from `earlier` messages.

    Raises:
        InvalidRequestError: names the item of the input that is wrong.
    """
    instructions = [Message(role="system", content=body.instructions)] if body.instructions else []
    messages = (*instructions, *earlier, *messages_of(body.input))
    if not messages:
        raise InvalidRequestError("input holds no message.", param="input")
    effort = validate(Effort, {"reasoning_effort": body.reasoning}).reasoning_effort
    return ResponsesRequest.model_construct(
        **{name: getattr(body, name) for name in SamplingFields.model_fields},
        messages=messages,
        max_tokens=body.max_output_tokens,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=body.text,
        reasoning_effort=effort,
        chat_template_kwargs=body.chat_template_kwargs,
        body=body,
    )
