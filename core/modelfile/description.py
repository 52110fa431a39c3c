"""Reads what describes a model, whichever form it has: configuration, end tokens, tokenizer.

Router and engine call it with a path from `resolve_model`. A folder and a .gguf file look alike
behind it; weights are the engine's business.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError

if TYPE_CHECKING:
    from core.modelfile.gguf_file import GgufFile


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer and what belongs to it."""

    tokenizer: Any
    """A `tokenizers.Tokenizer`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of tokenizer_config.json; empty where there is none."""
    chat_template: str | None
    """Jinja source; None if the model has none."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """bos_token, eos_token, unk_token, pad_token: text of those that exist."""


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json as a dict.

    Raises:
        ConfigError: missing or malformed.
    """
    if path.suffix == ".gguf":
        return _gguf(path).config
    return _read_json(path / "config.json")


def read_generation_config(path: Path) -> dict[str, Any]:
    """The model's generation_config.json as a dict, empty if there is none.

    Raises:
        ConfigError: malformed.
    """
    if path.suffix == ".gguf":
        return _gguf(path).generation_config
    file = path / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """Ids that end an output: of generation_config.json, else of config.json; in ascending order.

    Raises:
        ConfigError: malformed files.
    """
    for config in (read_generation_config(path), read_config(path)):
        ids = config.get("eos_token_id")
        if ids is not None:
            return tuple(sorted(set(ids))) if isinstance(ids, list) else (int(ids),)
    return ()


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Load the tokenizer, its chat template and its special tokens.

    Raises:
        ConfigError: there is no tokenizer.json, or it can't be read.
    """
    if path.suffix == ".gguf":
        gguf = _gguf(path)
        return TokenizerFiles(
            tokenizer=gguf.tokenizer(),
            chat_template=gguf.chat_template,
            special_tokens=gguf.special_tokens(),
        )
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} has no tokenizer.json; convert the tokenizer to that form first."
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} can't be read: {error}.") from error
    config_file = path / "tokenizer_config.json"
    config = _read_json(config_file) if config_file.is_file() else {}
    return TokenizerFiles(
        tokenizer=tokenizer,
        config=config,
        chat_template=_chat_template(path, config),
        special_tokens=_special_tokens(config),
    )


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            found[name] = str(token)
    return found


def _gguf(path: Path) -> "GgufFile":
    from core.modelfile.gguf_file import GgufFile

    return GgufFile(path)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(value).__name__}.")
    return value
