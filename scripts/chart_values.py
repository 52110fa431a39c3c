"""What deploy/helm/diptych/values.yaml says of each value: default, purpose, and what it may be.

`scripts/build_chart.py` makes the chart's schema and its reference from it. The comment lines right
above a key are read: `# -- text` is its purpose, `# @schema ...` narrows or replaces the schema
that follows from its default:

    strings    a mapping of strings         model            any part of the value `model`
    object     any mapping                  pools            a mapping of pools
    list       a list of mappings           settings:NAME    the settings of a process
    {...}      JSON, merged into the schema of the default
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

Schema = dict[str, Any]
_KINDS: Mapping[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_NAMED: Mapping[str, Schema] = {
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "object": {"type": "object"},
    "list": {"type": "array", "items": {"type": "object"}},
    "model": {"$ref": "#/definitions/model"},
    "pools": {
        "type": "object",
        "additionalProperties": {"anyOf": [{"$ref": "#/definitions/pool"}, {"type": "null"}]},
    },
}


class UndocumentedValueError(Exception):
    """A key of values.yaml says too little; the message names it and what it lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One key."""

    path: tuple[str, ...]
    default: Any
    text: str
    """Its purpose; empty for a mapping whose keys speak for themselves."""
    hint: str
    """What follows `# @schema`, or empty."""

    @property
    def is_group(self) -> bool:
        """True if it stands for the keys below it."""
        return isinstance(self.default, dict) and bool(self.default) and not self.hint


def read_values(text: str) -> list[Value]:
    """Every key of a values.yaml, parents before children, in the file's order.

    Raises:
        UndocumentedValueError: a key that is no group has no `# --` line.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None, "values.yaml is never empty"
    values = list(_walk(node, yaml.safe_load(text), text.splitlines(), ()))
    for value in values:
        if not value.text and not value.is_group and value.path != ("pools",):
            raise UndocumentedValueError(f"{'.'.join(value.path)} has no line `# -- purpose`.")
    return values


def _walk(
    node: yaml.Node, defaults: dict[str, Any], lines: list[str], above: tuple[str, ...]
) -> Iterator[Value]:
    assert isinstance(node, yaml.MappingNode)
    for key, child in node.value:
        text, hint = _comment(lines, key.start_mark.line)
        default = defaults[key.value]
        value = Value(path=(*above, key.value), default=default, text=text, hint=hint)
        yield value
        if value.is_group:
            yield from _walk(child, default, lines, value.path)


def _comment(lines: list[str], line: int) -> tuple[str, str]:
    """Purpose and hint out of the comment that ends right above a line."""
    first = line
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    text: list[str] = []
    hint = ""
    for comment in (each.lstrip().removeprefix("#").strip() for each in lines[first:line]):
        if comment.startswith("@schema "):
            hint = comment.removeprefix("@schema ")
        elif comment.startswith("-- "):
            text = [comment.removeprefix("-- ")]
        elif text:
            text.append(comment)
    return " ".join(text), hint


def schema_of(
    values: list[Value], above: tuple[str, ...], settings: Mapping[str, Schema]
) -> Schema:
    """Strict schema of the keys below `above`.

    Args:
        values: of the whole file.
        above: path of a group; empty for the whole.
        settings: schemas that `settings:NAME` stands for.

    Raises:
        UndocumentedValueError: a default from which nothing follows has no hint.
    """
    properties = {
        value.path[-1]: _schema(value, values, settings)
        for value in values
        if value.path[:-1] == above
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _schema(value: Value, values: list[Value], settings: Mapping[str, Schema]) -> Schema:
    if value.is_group:
        return schema_of(values, value.path, settings)
    described = {"description": value.text} if value.text else {}
    if value.hint.startswith("settings:"):
        return settings[value.hint.removeprefix("settings:")] | described
    if value.hint and not value.hint.startswith("{"):
        return _NAMED[value.hint] | ({} if value.hint == "model" else described)
    narrowed = json.loads(value.hint) if value.hint else {}
    if isinstance(value.default, list) and "items" in narrowed:
        return {"type": "array"} | narrowed | described
    kind = _KINDS.get(type(value.default))
    if kind is None and "type" not in narrowed:
        raise UndocumentedValueError(f"{'.'.join(value.path)} needs a line `# @schema`.")
    return {"type": kind} | narrowed | described


def settings_schema(cls: type[BaseModel]) -> Schema:
    """What `config` of a process may hold: its settings, as YAML gives them.

    Looser than the process itself, which has the last word: durations and sizes are numbers or
    text, lists are lists or text with commas.
    """
    properties: dict[str, Schema] = {}
    for name, field in cls.model_fields.items():
        arms = get_args(field.annotation) if type(None) in get_args(field.annotation) else ()
        kinds = [arm for arm in arms or (field.annotation,) if arm is not type(None)]
        schema = _setting(kinds[0], has_unit="Unit(" in repr((field, kinds)))
        if arms:
            schema = {"anyOf": [schema, {"type": "null"}]}
        properties[name] = schema | {"description": field.description}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _setting(kind: Any, *, has_unit: bool) -> Schema:
    if has_unit:
        return {"type": ["number", "string"]}
    choices = get_args(kind)
    if choices and all(isinstance(choice, str) for choice in choices):
        return {"enum": list(choices)}
    if kind in (bool, int, float):
        return {"type": _KINDS[kind]}
    if get_origin(kind) in (tuple, list):
        return {"type": ["array", "string"]}
    if get_origin(kind) is dict:
        return {"type": ["object", "string"]}
    return {"type": "string"}
