"""Makes the text side of a model: what transformers' AutoTokenizer would do with the same files.

Called once at start, by router/main.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from core.errors import ConfigError
from core.modelfile.description import read_tokenizer
from router.text import reasoning
from router.text.chat_template import ChatTemplate
from router.text.processor import TextProcessor
from router.text.tools.formats import ToolFormat, choose_format


def load_text(
    model: Path,
    *,
    chat_template: Path | None = None,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> TextProcessor:
    """Load a model's tokenizer and chat template.

    Args:
        model: what `core.modelfile.resolve.resolve_model` returned.
        chat_template: file to use instead of the model's own template.
        tool_parser: how the model writes function calls; see `choose_format`.
        reasoning_parser: `think`, `none`, or `auto` to go by the template.

    Raises:
        ConfigError: a file is missing or unreadable, or the template is not valid jinja.
    """
    files = read_tokenizer(model)
    source = files.chat_template
    if chat_template is not None:
        try:
            source = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Chat template {chat_template} can't be read: {error}.") from error
    config_file = model / "tokenizer_config.json"
    config = json.loads(config_file.read_bytes()) if config_file.is_file() else {}
    return text_processor(
        files.tokenizer,
        source,
        files.special_tokens,
        config,
        tool_format=choose_format(tool_parser, source),
        reasons=reasoning_parser == "think"
        or (reasoning_parser == "auto" and reasoning.END in (source or "")),
    )


def text_processor(
    tokenizer: Tokenizer,
    template: str | None,
    special_tokens: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    tool_format: ToolFormat | None = None,
    reasons: bool = False,
) -> TextProcessor:
    """Put a text side together from its parts.

    Args:
        tokenizer: as serialised in tokenizer.json; changed in place.
        template: chat template as jinja text, None for a model without.
        special_tokens: text of bos_token, eos_token and so on.
        config: contents of tokenizer_config.json.
        tool_format: how the model writes function calls.
        reasons: the model may think aloud.

    Raises:
        ConfigError: the template is not valid jinja, or prompts shall begin or end with a token
            that there is not.
    """
    if "add_bos_token" in config or "add_eos_token" in config:
        # As in transformers, these two decide alone once either is given.
        bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
        eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
        tokenizer.post_processor = _surround(tokenizer, bos, eos)
    compiled = ChatTemplate(template, special_tokens) if template is not None else None
    return TextProcessor(tokenizer, compiled, tool_format=tool_format, reasons=reasons)


def _surround(
    tokenizer: Tokenizer, bos: str | None, eos: str | None
) -> processors.TemplateProcessing:
    ids = {token: tokenizer.token_to_id(token) for token in (bos, eos) if token is not None}
    for token, token_id in ids.items():
        if token_id is None:
            raise ConfigError(
                f"tokenizer_config.json adds {token!r} to prompts, but tokenizer.json has no such "
                "token."
            )
    single = [part for part in (bos, "$A", eos) if part is not None]
    return processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=list(ids.items())
    )
