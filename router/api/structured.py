"""Fields of a request that say what its output must be, in OpenAI's, SGLang's and vLLM's words.

Only their shape is checked here. Whether there is such a schema, expression or grammar is for the
worker to say, which compiles it before the first token: so one library decides, and this process
needs none. What a worker refuses reaches the client as the same 400.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import orjson
from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput, StructureKind
from router.api.fields import Strict, wrong
from router.api.parsing import known_names


def _as_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise wrong("must be a string that is not empty")
    return value


def _as_schema(value: Any) -> str:
    """A schema as an object, or as the text of one."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise wrong(f"must be a JSON schema; as JSON it is wrong: {error}") from None
    if not isinstance(value, dict):
        raise wrong("must be a JSON schema: an object, or the text of one")
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise wrong(f"must be a JSON schema that can be passed on: {error}") from None


def _as_choice(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
        raise wrong("must be a list of at least one string, none of them empty")
    return orjson.dumps(value).decode()


_DEFINITIONS: dict[StructureKind, Callable[[Any], str]] = {
    "json_schema": _as_schema,
    "regex": _as_text,
    "ebnf": _as_text,
    "choice": _as_choice,
}


def _read(kind: StructureKind, value: Any) -> StructuredOutput:
    try:
        return StructuredOutput(kind=kind, definition=_DEFINITIONS[kind](value))
    except InvalidRequestError as error:  # it is too long
        raise wrong(error.message) from None


def _read_part(kind: StructureKind, value: Any, where: str) -> StructuredOutput:
    try:
        return _read(kind, value)
    except PydanticCustomError as error:
        raise InvalidRequestError(f"{where}: {error.message()}.", param=where) from None


def parse_response_format(value: Any) -> StructuredOutput | None:
    """Check the field `response_format`."""
    where = "response_format"
    if not isinstance(value, dict):
        raise wrong("must be an object")
    form = known_names(value, ("type", "json_schema"), {}, where=f"{where}.")
    match form.get("type"):
        case "json_schema":
            return _named_schema(form.get("json_schema"), f"{where}.json_schema")
        case "text" | "json_object" as kind:
            if "json_schema" in form:
                raise wrong(f"of type {kind} takes no json_schema")
            return None if kind == "text" else StructuredOutput(kind="json_object")
        case _:
            raise wrong("must have a type, one of text, json_object and json_schema")


def _named_schema(value: Any, where: str) -> StructuredOutput:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    names = ("name", "description", "schema", "strict")
    named = known_names(value, names, {}, where=f"{where}.")
    # Every schema is enforced: strict asks for no more, and its absence for no less.
    for name, kind, what in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("strict", bool, "a boolean"),
    ):
        if not isinstance(named.get(name, kind()), kind):
            param = f"{where}.{name}"
            raise InvalidRequestError(f"{param} must be {what}.", param=param)
    return _read_part("json_schema", named.get("schema"), f"{where}.schema")


_STRUCTURED_OUTPUTS: dict[str, StructureKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
}


def _structured_outputs(value: Any) -> StructuredOutput | None:
    where = "structured_outputs."
    if not isinstance(value, dict):
        raise wrong("must be an object")
    fields = known_names(value, (*_STRUCTURED_OUTPUTS, "json_object"), {}, where=where)
    asked: dict[str, StructuredOutput | None] = {}
    any_object = fields.pop("json_object", False)
    if not isinstance(any_object, bool):
        raise InvalidRequestError(
            f"{where}json_object must be a boolean.", param=f"{where}json_object"
        )
    if any_object:
        asked[f"{where}json_object"] = StructuredOutput(kind="json_object")
    for name, part in fields.items():
        asked[where + name] = _read_part(_STRUCTURED_OUTPUTS[name], part, where + name)
    return _only(asked)


def _only(asked: dict[str, StructuredOutput | None]) -> StructuredOutput | None:
    names = [name for name, structured in asked.items() if structured is not None]
    if len(names) > 1:
        raise InvalidRequestError(
            f"{names[0]} and {names[1]} both say what the output must be; send one of them.",
            param=names[1],
        )
    return asked[names[0]] if names else None


_OBJECT = {"type": "object"}
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_SCHEMA_JSON = WithJsonSchema({"anyOf": [_OBJECT, {"type": "string"}]})
_TEXT_JSON = WithJsonSchema(_TEXT)
_FORMAT_JSON = WithJsonSchema(
    {
        "type": "object",
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "description": {"type": "string"},
                    "schema": _OBJECT,
                    "strict": {"type": "boolean"},
                },
                "required": ["schema"],
                "additionalProperties": False,
            },
        },
        "required": ["type"],
        "additionalProperties": False,
    }
)
_OUTPUTS_JSON = WithJsonSchema(
    {
        "type": "object",
        "properties": {
            "json": {"anyOf": [_OBJECT, {"type": "string"}]},
            "json_object": {"type": "boolean"},
            "regex": _TEXT,
            "grammar": _TEXT,
            "choice": _TEXTS,
        },
        "additionalProperties": False,
    }
)
_Field = StructuredOutput | None
SchemaField = Annotated[_Field, PlainValidator(partial(_read, "json_schema")), _SCHEMA_JSON]
RegexField = Annotated[_Field, PlainValidator(partial(_read, "regex")), _TEXT_JSON]
GrammarField = Annotated[_Field, PlainValidator(partial(_read, "ebnf")), _TEXT_JSON]


class StructureFields(Strict):
    """What chats and completions share; at most one field may ask for something."""

    response_format: Annotated[_Field, PlainValidator(parse_response_format), _FORMAT_JSON] = None
    json_schema: SchemaField = None
    regex: RegexField = None
    ebnf: GrammarField = None
    guided_json: SchemaField = None
    guided_regex: RegexField = None
    guided_grammar: GrammarField = None
    guided_choice: Annotated[
        _Field, PlainValidator(partial(_read, "choice")), WithJsonSchema(_TEXTS)
    ] = None
    structured_outputs: Annotated[_Field, PlainValidator(_structured_outputs), _OUTPUTS_JSON] = None

    @property
    def structured(self) -> StructuredOutput | None:
        """What the output must be; None for anything.

        Raises:
            InvalidRequestError: two fields say so.
        """
        return _only({name: getattr(self, name) for name in StructureFields.model_fields})
