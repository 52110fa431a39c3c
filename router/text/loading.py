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
from router.text.chat_template import ChatTemplate
from router.text.processor import TextProcessor


def load_text(model: Path, *, chat_template: Path | None = None) -> TextProcessor:
    """Load a model's tokenizer and chat template.

    Args:
        model: what `core.modelfile.resolve.resolve_model` returned.
        chat_template: file to use instead of the model's own template.

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
    return text_processor(files.tokenizer, source, files.special_tokens, files.config)


def text_processor(
    tokenizer: Tokenizer,
    template: str | None,
    special_tokens: Mapping[str, str],
    config: Mapping[str, Any],
) -> TextProcessor:
    """Put a text side together from its parts.

    Args:
        tokenizer: as serialised in tokenizer.json; changed in place.
        template: chat template as jinja text, None for a model without.
        special_tokens: text of bos_token, eos_token and so on.
        config: contents of tokenizer_config.json.

    Raises:
        ConfigError: the template is not valid jinja, or prompts shall begin or end with a token
            that there is not.
    """
    apply_added_tokens(tokenizer, special_tokens, config)
    compiled = ChatTemplate(template, special_tokens) if template is not None else None
    return TextProcessor(tokenizer, compiled)
