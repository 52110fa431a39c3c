"""What the OpenAPI document says of the fields of /v1/responses that are read by hand."""

from typing import Any

from router.api.messages import MAX_MESSAGES
from router.api.requests import Effort
from router.api.tools import MAX_TOOLS

_STRING = {"type": "string"}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


INPUT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {"type": "object"},
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
        },
    ]
}
TOOLS = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": _object(
        {
            "type": {"const": "function"},
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
            "description": {"type": ["string", "null"]},
            "parameters": {"type": ["object", "null"]},
            "strict": {"type": ["boolean", "null"]},
        },
        "type",
        "name",
    ),
}
CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        _object({"type": {"const": "function"}, "name": _STRING}, "type", "name"),
    ]
}
_FORMAT_SCHEMA = _object(
    {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "name": _STRING,
        "description": _STRING,
        "schema": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "type",
)
TEXT = _object({"format": _FORMAT_SCHEMA, "verbosity": {"const": "medium"}})
REASONING = _object(
    {"effort": Effort.model_json_schema()["properties"]["reasoning_effort"]}
    | {key: {"enum": ["auto", None]} for key in ("summary", "generate_summary")}
)
STREAM_OPTIONS = _object({"include_obfuscation": {"const": False}}, "include_obfuscation")
