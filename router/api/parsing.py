"""From a JSON body to a typed request, or a 400 that names the field.

The rules for fields: null means the default; one that we know of but don't serve is refused by name
unless its value asks for nothing; an unknown one is refused with the nearest name.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from core.errors import InvalidRequestError
from router.api.bounds import check_bounds
from router.api.unserved import HINTS

Parsed = TypeVar("Parsed", bound=BaseModel)

MAX_DEPTH = 100
"""Deepest nesting of arrays and objects in a body.

Source: own judgement: JSON schemas of real tools have a dozen levels; libraries that pass values on
give up at 250.
"""
_SHOWN_CHARS = 80
"""Of a value that is wrong."""
_SHOWN_MEMBERS = 8


def parse_json(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidRequestError: it is not one, is nested too deeply, or holds too much.
    """
    opened = check_bounds(body)
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidRequestError(
            f"The body must be a JSON object, not {_json_kind(data)}.", param=None
        )
    if opened > MAX_DEPTH and _deeper_than(data, MAX_DEPTH):
        raise InvalidRequestError(f"The body is nested more than {MAX_DEPTH} levels deep.")
    return data


def known_fields(
    data: Mapping[str, Any],
    model: type[BaseModel],
    unserved: Mapping[str, Sequence[Any]],
    *,
    where: str = "",
) -> dict[str, Any]:
    """Drop fields that are null or ask for nothing; refuse the ones that we can't honour.

    Args:
        data: a JSON object.
        model: says which fields are served.
        unserved: known fields that are not served, with the values besides null that ask for
            nothing.
        where: prefix of field names in errors, such as "messages[0].".

    Raises:
        InvalidRequestError: a field is unknown or not served.
    """
    return known_names(data, model.model_fields, unserved, where=where)


def known_names(
    data: Mapping[str, Any],
    names: Collection[str],
    unserved: Mapping[str, Sequence[Any]],
    *,
    where: str = "",
) -> dict[str, Any]:
    """The same for an object whose served fields are `names`."""
    kept = {}
    for name, value in data.items():
        if name in names:
            if value is not None:
                kept[name] = value
        elif name not in unserved:
            raise _unknown(name, [*names, *unserved], where)
        elif value is not None and not any(_same(value, off) for off in unserved[name]):
            raise InvalidRequestError(
                f"{where}{name} is not supported by this server; "
                f"{HINTS.get(name, 'leave it out')}.",
                param=f"{where}{name}",
            )
    return kept


def validate(model: type[Parsed], data: Mapping[str, Any], *, where: str = "") -> Parsed:
    """Check types and ranges.

    Raises:
        InvalidRequestError: names the first field that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    param = where + _path(first["loc"])
    if first["type"] == "missing":
        raise InvalidRequestError(f"{param} is required.", param=param)
    message = first["msg"][:1].lower() + first["msg"][1:]
    raise InvalidRequestError(f"{param}: {message}; got {_short(first['input'])}.", param=param)


def _deeper_than(data: Any, depth: int) -> bool:
    """Level by level, since recursion is what has to be kept within bounds."""
    level = [data]
    for _ in range(depth):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def _same(value: Any, off: Any) -> bool:
    return type(value) is type(off) and value == off


def _unknown(name: str, known: Iterable[str], where: str) -> InvalidRequestError:
    # Looking for what is like a name takes time with its length.
    near = difflib.get_close_matches(name[:64], list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    shown = name if len(name) <= 64 else f"{name[:64]}…"
    return InvalidRequestError(f"Unknown field {where}{shown}{hint}", param=f"{where}{shown}")


def _path(loc: Sequence[str | int]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _short(value: Any) -> str:
    """A value as messages show it. It may be all of a body, which nobody wants to read."""
    if isinstance(value, str):
        value = value[: _SHOWN_CHARS + 1]
    elif isinstance(value, list | dict):
        members = value.values() if isinstance(value, dict) else value
        if len(value) > _SHOWN_MEMBERS or any(isinstance(each, list | dict) for each in members):
            return f"{_json_kind(value)} of {len(value)}"
    try:
        text = orjson.dumps(value).decode()
    except TypeError:
        text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _json_kind(value: Any) -> str:
    kinds = {
        list: "an array",
        dict: "an object",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return kinds.get(type(value), "a number")
