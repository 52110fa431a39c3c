"""Makes the text side of a model: what transformers' AutoTokenizer would do with the same files.

Called once at start, by router/main.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from core.errors import ConfigError
from core.modelfile.added_tokens import apply_added_tokens
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
    return text_processor(
        files.tokenizer,
        source,
        files.special_tokens,
        files.config,
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
    apply_added_tokens(tokenizer, special_tokens, config)
    compiled = ChatTemplate(template, special_tokens) if template is not None else None
    return TextProcessor(tokenizer, compiled, tool_format=tool_format, reasons=reasons)
