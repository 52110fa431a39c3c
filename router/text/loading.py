"""Reads tokenizer and chat template of a model, as transformers' AutoTokenizer would.

Called once at start, by router/main.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from core.errors import ConfigError
from router.text.chat_template import ChatTemplate
from router.text.processor import TextProcessor


def load_text(model: Path, *, chat_template: Path | None = None) -> TextProcessor:
    """Load a model's text side.

    Args:
        model: folder with tokenizer.json and tokenizer_config.json, and chat_template.jinja where
            the template is not in the config.
        chat_template: file to use instead of the model's own template.

    Raises:
        ConfigError: a file is missing or unreadable; the message names it.
    """
    if not (model / "tokenizer.json").is_file():
        raise ConfigError(
            f"No tokenizer.json in {model}: give a model folder in Hugging Face form."
        )
    try:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{model / 'tokenizer.json'} can't be read: {error}.") from error
    config = {
        **_read_json(model / "special_tokens_map.json"),
        **_read_json(model / "tokenizer_config.json"),
    }
    template = chat_template or model / "chat_template.jinja"
    source = _template_source(config)
    if chat_template is not None or template.is_file():
        source = _read_text(template)
    return text_processor(tokenizer, config, source)


def text_processor(
    tokenizer: Tokenizer, config: Mapping[str, Any], template: str | None
) -> TextProcessor:
    """Put a text side together from its parts.

    Args:
        tokenizer: as serialised in tokenizer.json; changed in place.
        config: contents of tokenizer_config.json.
        template: chat template as jinja text, None for a model without.

    Raises:
        ConfigError: the template is not valid jinja.
    """
    specials = special_tokens(config)
    _apply_bos_eos(tokenizer, config, specials)
    compiled = ChatTemplate(template, specials) if template is not None else None
    return TextProcessor(tokenizer, compiled)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens of a tokenizer_config.json, such as bos_token, as strings."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _apply_bos_eos(
    tokenizer: Tokenizer, config: Mapping[str, Any], specials: Mapping[str, str]
) -> None:
    """Let add_bos_token and add_eos_token, when the config has them, decide as in transformers."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    around = [
        specials.get(f"{name}_token") if config.get(f"add_{name}_token") else None
        for name in ("bos", "eos")
    ]
    bos, eos = around
    single = " ".join(part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part)
    named = []
    for token in filter(None, around):
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(
                f"tokenizer_config.json adds {token!r} to prompts, but tokenizer.json has no "
                "such token."
            )
        named.append((token, token_id))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=named
    )


def _template_source(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}.") from error
