"""Gives an engine the grammars of its model's vocabulary."""

import logging
from importlib.util import find_spec

from core.errors import ConfigError
from core.modelfile.description import read_tokenizer
from core.modelfile.resolve import resolve_model
from engine.config import EngineConfig
from engine.grammar.backend import GrammarBackend
from engine.grammar.compiler import GrammarCompiler
from engine.models.config import ModelConfig

DEFAULT_BACKEND = "llguidance"
log = logging.getLogger(__name__)


def build_grammars(config: EngineConfig, model: ModelConfig) -> GrammarCompiler | None:
    """Read the model's tokenizer and join it with the configured library.

    Args:
        config: of the engine.
        model: of its executor.

    Returns:
        None without the default library, or for a model without a tokenizer or an end-of-sequence
        id: everything else is served. The log says why.

    Raises:
        ConfigError: a library was chosen that is not installed.
    """
    if find_spec(config.grammar_backend) is None:
        missing = f"{config.grammar_backend} is not installed: pip install {config.grammar_backend}"
        if config.grammar_backend != DEFAULT_BACKEND:
            raise ConfigError(f"The grammar backend {missing}, or choose {DEFAULT_BACKEND}.")
        log.warning("no structured output: %s", missing)
        return None
    if not model.eos_token_ids:
        log.warning("no structured output: the model names no end-of-sequence id")
        return None
    try:
        tokenizer_json = read_tokenizer(resolve_model(config.model)).tokenizer.to_str()
        return GrammarCompiler(_backend(config.grammar_backend, tokenizer_json, model))
    except (ConfigError, ValueError) as error:
        log.warning("no structured output: %s", error)
        return None


def _backend(name: str, tokenizer_json: str, model: ModelConfig) -> GrammarBackend:
    # A library is loaded only where it is used: xgrammar is an extra, and brings much with it.
    if name == "xgrammar":
        from engine.grammar.xgrammar_backend import XgrammarBackend

        return XgrammarBackend(tokenizer_json, model.vocab_size, model.eos_token_ids)
    from engine.grammar.llguidance_backend import LlguidanceBackend

    return LlguidanceBackend(tokenizer_json, model.vocab_size, model.eos_token_ids)
