"""Which tokens a prompt begins and ends with, as transformers' AutoTokenizer would have it.

Router and engine call it on a tokenizer that they have just read.
"""

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError


def apply_added_tokens(
    tokenizer: Any, special_tokens: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Let add_bos_token and add_eos_token decide alone, once either is given.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; changed in place.
        special_tokens: text of bos_token and eos_token, as far as there are any.
        config: contents of tokenizer_config.json.

    Raises:
        ConfigError: prompts shall begin or end with a token that there is not.
    """
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    from tokenizers import processors

    bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
    ids = {token: tokenizer.token_to_id(token) for token in (bos, eos) if token is not None}
    for token, token_id in ids.items():
        if token_id is None:
            raise ConfigError(
                f"tokenizer_config.json adds {token!r} to prompts, but tokenizer.json has no such "
                "token."
            )
    single = [part for part in (bos, "$A", eos) if part is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=list(ids.items())
    )
