"""Writes a GGUF model out as a Hugging Face folder with float32 weights."""

import json
from pathlib import Path
from typing import Any

from core.modelfile.gguf_file import GgufFile
from core.modelfile.resolve import Progress


def convert_gguf(source: Path, folder: Path, progress: Progress) -> None:
    """Fill `folder` with what transformers expects of a pretrained model.

    Args:
        source: a GGUF file of the llama architecture.
        folder: existing, empty.
        progress: told before each slow stage.

    Raises:
        ConfigError: the file holds something that can't be converted.
    """
    from safetensors.numpy import save_file

    progress("reading the model file")
    gguf = GgufFile(source)
    _write_json(folder / "config.json", gguf.config)
    _write_json(folder / "generation_config.json", gguf.generation_config)
    progress("converting the tokenizer")
    gguf.tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(gguf))
    progress("converting the weights to float32")
    weights = {name: _contiguous(values) for name, values in gguf.weights()}
    target = folder / "model.safetensors"
    save_file(weights, target, metadata={"format": "pt"})
    # safetensors creates files that only their owner may read; workers may run as another user.
    target.chmod(0o644)


def _contiguous(values: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(values)


def _tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.config["max_position_embeddings"],
        **gguf.special_tokens(),
    }
    if gguf.chat_template:
        config["chat_template"] = gguf.chat_template
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
