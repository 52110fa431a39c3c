"""How a process gets its settings: one YAML file, then the environment, then the command line.

Every entry point calls `load` (or `load_or_exit`) with a flat pydantic model of its own; this file
knows no setting by name. Later sources win: default < YAML < environment < command line. A name
that the model does not have is refused wherever it stands, with the nearest one that it has.
"""

import argparse
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, SecretStr, ValidationError
from pydantic import ByteSize as PydanticByteSize
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError

from core.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Unit:
    """Annotation that puts a unit into `--help`."""

    name: str
    examples: str


_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|m|h)?\s*")


def parse_seconds(value: object) -> object:
    """Turn "250ms", "1.5s", "2m" or "1h" into seconds; other types pass to the next validator."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError("a duration is a number and ms, s, m or h, as in 250ms")
    return float(match[1]) * _SECONDS[match[2] or "s"]


Seconds = Annotated[float, BeforeValidator(parse_seconds), Unit("seconds", "250ms, 2m, 1h")]
"""A duration; a bare number is seconds."""
ByteSize = Annotated[PydanticByteSize, Unit("bytes", "512MiB, 2GB")]
"""A size; a bare number is bytes."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Values from one place, and how to name that place for one of them."""

    values: Mapping[str, Any]
    places: Mapping[str, str]


def load(
    cls: type[T], argv: Sequence[str], *, prog: str, env_prefix: str, description: str | None = None
) -> T:
    """Resolve the settings of one process.

    Args:
        cls: a pydantic model whose fields are scalars, secrets, or lists and dicts of scalars.
        argv: command line without the program's name.
        prog: how the user calls the program; heads help and messages.
        env_prefix: what its environment variables begin with, as in "DIPTYCH_ROUTER_".
        description: first paragraph of `--help`; default: the model's docstring.

    Raises:
        ConfigError: a name is unknown or a value is not allowed; the message says where it stands.
        SystemExit: code 0, after printing what `--help`, `--print-config` or `--check` asks for.
    """
    parser = _parser(cls, prog, env_prefix, description or cls.__doc__)
    given = _parse(parser, argv)
    config: str | None = given.pop("config")
    print_config: bool = given.pop("print_config")
    check: bool = given.pop("check")
    sources = [
        _Source(_none_text(cls, given), {name: _option(name) for name in given}),
        _environment(cls, env_prefix),
        _file(cls, config),
    ]
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged |= {name: _split(cls.model_fields[name], v) for name, v in source.values.items()}
    try:
        settings = cls.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error, sources)) from None
    if print_config:
        sys.stdout.write(dump(settings))
        raise SystemExit(0)
    if check:
        sys.stdout.write("ok\n")
        raise SystemExit(0)
    return settings


def load_or_exit(
    cls: type[T], argv: Sequence[str], *, prog: str, env_prefix: str, description: str | None = None
) -> T:
    """`load` for the edge of a program: a ConfigError becomes a message and exit code 2."""
    try:
        return load(cls, argv, prog=prog, env_prefix=env_prefix, description=description)
    except ConfigError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        raise SystemExit(2) from None


def secret_names(cls: type[BaseModel]) -> frozenset[str]:
    """Names of the settings that are secrets."""
    return frozenset(name for name, field in cls.model_fields.items() if _is_secret(field))


def secret_values(settings: BaseModel) -> list[str]:
    """The secrets that are set, for whatever must not let them out."""
    found = [getattr(settings, name) for name in secret_names(type(settings))]
    return [secret.get_secret_value() for secret in found if secret is not None]


def dump(settings: BaseModel) -> str:
    """The settings as YAML that `--config` reads, except that secrets are masked."""
    values = settings.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _option(name: str) -> str:
    # A trailing underscore keeps a field apart from a name that pydantic has taken, such as `json`.
    return "--" + name.rstrip("_").replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def _parser(
    cls: type[BaseModel], prog: str, env_prefix: str, description: str | None
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, by field name.")
    parser.add_argument(
        "--print-config", action="store_true", help="Print the resolved settings and exit."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="Check the settings from all sources, print ok and exit; starts nothing.",
    )
    for name, field in cls.model_fields.items():
        text = " ".join(_help(name, field, env_prefix)).replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(
                _option(name),
                dest=name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            parser.add_argument(
                _option(name),
                dest=name,
                metavar=_metavar(field),
                default=argparse.SUPPRESS,
                help=text,
            )
    return parser


def _help(name: str, field: FieldInfo, env_prefix: str) -> Iterable[str]:
    yield (field.description or "").strip()
    unit = _unit(field)
    if unit is not None:
        yield f"In {unit.name}, or as in {unit.examples}."
    if field.is_required():
        yield "Required."
    elif "default:" not in (field.description or ""):
        yield f"Default: {_shown(field.get_default(call_default_factory=True))}."
    yield f"[{env_prefix}{name.upper()}]"


def _shown(default: object) -> str:
    match default:
        case None | () | []:
            return "none"
        case bool():
            return str(default).lower()
        case PydanticByteSize():
            return default.human_readable()
        case list() | tuple():
            return ",".join(map(str, default))
        case _:
            return str(default)


def _unit(field: FieldInfo) -> Unit | None:
    found = [item for item in field.metadata if isinstance(item, Unit)]
    for arm in _arms(field.annotation):
        found += [item for item in getattr(arm, "__metadata__", ()) if isinstance(item, Unit)]
    return found[0] if found else None


def _arms(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, else the annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _kinds(field: FieldInfo) -> list[Any]:
    """What a value may be, without None and without annotations."""
    return [_plain(arm) for arm in _arms(field.annotation) if arm is not type(None)]


def _metavar(field: FieldInfo) -> str:
    kind = _kinds(field)[0]
    unit = _unit(field)
    if unit is not None:
        return unit.name.upper()
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(kind)) + "}"
    if _is_list(kind):
        return "A,B,..."
    names = {int: "INT", float: "NUMBER", SecretStr: "SECRET"}
    return names.get(kind, "TEXT")


def _is_list(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, (list, tuple, set, frozenset))


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in _kinds(field)


def _split(field: FieldInfo, value: Any) -> Any:
    """Read the text of a list (commas or JSON) or of a mapping (JSON)."""
    if not isinstance(value, str):
        return value
    kinds = _kinds(field)
    if any(_is_list(kind) for kind in kinds) and not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    if any(_is_list(kind) or get_origin(kind) is dict for kind in kinds):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def _none_text(cls: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Let the text `none` unset a field that may be unset."""
    unset = {
        name
        for name, value in values.items()
        if value in ("none", "null") and type(None) in _arms(cls.model_fields[name].annotation)
    }
    return {name: None if name in unset else value for name, value in values.items()}


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    known, extra = parser.parse_known_args(list(argv))
    for word in extra:
        if word.startswith("-"):
            options = [o for o in parser._option_string_actions if o.startswith("--")]
            raise ConfigError(_unknown("option", word.partition("=")[0], options, parser.prog))
    if extra:
        raise ConfigError(f"Unexpected argument {extra[0]!r}. See {parser.prog} --help.")
    return vars(known)


def _unknown(what: str, name: str, known: Iterable[str], where: str) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}?" if near else "See --help for what there is."
    return f"Unknown {what} {name} ({where}). {hint}"


def _environment(cls: type[BaseModel], env_prefix: str) -> _Source:
    names = {f"{env_prefix}{name.upper()}": name for name in cls.model_fields}
    for variable, value in os.environ.items():
        if not variable.startswith(env_prefix) or variable in names:
            continue
        message = _unknown("variable", variable, names, "in the environment")
        if (
            re.search(r"_(SERVICE_(HOST|PORT)|PORT(_\d+_(TCP|UDP).*)?)$", variable)
            or "://" in value
        ):
            message += (
                " Kubernetes adds such variables unless the pod has enableServiceLinks: false."
            )
        raise ConfigError(message)
    source = EnvSettingsSource(_reader(cls), env_prefix=env_prefix, case_sensitive=False)
    values = _none_text(cls, source())
    return _Source(values, {name: variable for variable, name in names.items()})


def _file(cls: type[BaseModel], config: str | None) -> _Source:
    if config is None:
        return _Source({}, {})
    path = Path(config)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
        if node is None:
            return _Source({}, {})
        places = _places(cls, path, node)
        return _Source(YamlConfigSettingsSource(_reader(cls), yaml_file=path)(), places)
    except OSError as error:
        raise ConfigError(f"The configuration file {path} can't be read: {error}") from None
    except (yaml.YAMLError, SettingsError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def _places(cls: type[BaseModel], path: Path, node: yaml.Node) -> dict[str, str]:
    """The line of each setting in a file; refuses names that the model does not have."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} must be a mapping of settings, as in `port: 9001`.")
    places: dict[str, str] = {}
    for key, _ in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if str(key.value) not in cls.model_fields:
            raise ConfigError(_unknown("key", str(key.value), cls.model_fields, place))
        if key.value in places:
            raise ConfigError(f"{key.value} stands twice: {places[key.value]} and {place}.")
        places[key.value] = place
    return places


def _reader(cls: type[BaseModel]) -> type[BaseSettings]:
    """The model in the form that pydantic-settings reads sources for."""
    config = SettingsConfigDict(enable_decoding=False, extra="forbid", frozen=False)
    return cast(
        type[BaseSettings], type(cls.__name__, (cls, BaseSettings), {"model_config": config})
    )


def _explain(cls: type[BaseModel], error: ValidationError, sources: Sequence[_Source]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        reason = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            lines.append(reason)
            continue
        name = str(problem["loc"][0])
        if problem["type"] == "missing":
            lines.append(f"{name} is required: give {_option(name)}, or set it in --config FILE.")
            continue
        places = [s.places[name] for s in sources if name in s.values]
        value = "(hidden)" if _is_secret(cls.model_fields[name]) else repr(problem["input"])
        lines.append(f"{name} = {value} ({places[0] if places else 'default'}): {reason}.")
    return "\n".join(lines)
