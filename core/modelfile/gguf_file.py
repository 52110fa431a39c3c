"""Reads a GGUF file of the llama architecture in Hugging Face terms: config, tokenizer, weights.

Conversion, direct loading and the router's tokenizer use it. Weights come out in float32 under the
names and in the row order that LlamaForCausalLM has.

Source: the GGUF specification and key names of ggml (docs/gguf.md, MIT), read through its `gguf`
package; the row order of q and k is the inverse of what llama.cpp's converter applies.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SPECIAL_TOKEN = 3
"""ggml's token type CONTROL."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """An open GGUF file; the weights stay on disk until asked for."""

    def __init__(self, path: Path) -> None:
        """Parse the header.

        Raises:
            ConfigError: not a GGUF file, or not of the llama architecture.
        """
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{path} can't be read as GGUF: {error}.") from error
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise ConfigError(
                f"{path.name} is a GGUF of architecture {architecture!r}; only 'llama' is read. "
                "Use the model's safetensors folder instead."
            )

    def field(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key, or `default`."""
        found = self._reader.fields.get(key)
        return default if found is None else found.contents()

    @property
    def config(self) -> dict[str, Any]:
        """What the model's config.json would say."""
        heads = self._required("llama.attention.head_count")
        hidden = self._required("llama.embedding_length")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
            "hidden_size": hidden,
            "intermediate_size": self._required("llama.feed_forward_length"),
            "num_hidden_layers": self._required("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("llama.attention.head_count_kv", heads),
            "head_dim": self.field("llama.attention.key_length", hidden // heads),
            "max_position_embeddings": self._required("llama.context_length"),
            "rms_norm_eps": _short(self._required("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": float(self.field("llama.rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
        }
        scaling = self._rope_scaling(config["rope_theta"], config["head_dim"])
        if scaling:
            config["rope_scaling"] = scaling
        return config

    @property
    def generation_config(self) -> dict[str, Any]:
        """What the model's generation_config.json would say."""
        config = self.config
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {key: config[key] for key in keys if config[key] is not None}

    @property
    def chat_template(self) -> str | None:
        """Jinja source, if the file carries one."""
        template: str | None = self.field("tokenizer.chat_template")
        return template

    def special_tokens(self) -> dict[str, str]:
        """Text of bos_token, eos_token, unk_token and pad_token, where the file names them."""
        tokens = self._reader.fields["tokenizer.ggml.tokens"]
        found = {}
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ):
            token_id = self.field(f"tokenizer.ggml.{key}_token_id")
            if token_id is not None:
                found[name] = tokens.contents(token_id)
        return found

    def tokenizer(self) -> Any:
        """Build the tokenizer, a `tokenizers.Tokenizer`.

        Raises:
            ConfigError: the vocabulary is of a kind that can't be read from GGUF.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models

        kind = self.field("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ConfigError(
                f"{self.path.name} has a {kind!r} vocabulary; from GGUF only byte-level BPE "
                "('gpt2') is read. Use the model's folder with tokenizer.json instead."
            )
        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        vocab = {token: token_id for token_id, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = _pre_tokenizer(self.field("tokenizer.ggml.pre", "default"))
        tokenizer.decoder = decoders.ByteLevel()
        types = self.field("tokenizer.ggml.token_type", [])
        special = [t for t, kind in zip(tokens, types, strict=False) if kind == _SPECIAL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
        if self.field("tokenizer.ggml.add_bos_token", False):
            bos = self.special_tokens()["bos_token"]
            tokenizer.post_processor = _prepend(bos, vocab[bos])
        return tokenizer

    def weight_names(self) -> list[str]:
        """Hugging Face names of all weights in the file."""
        return [_hf_name(name) for name in self._tensors if name != _ROPE_FACTORS]

    def weight(self, name: str) -> "NDArray[np.float32]":
        """One weight by its Hugging Face name, dequantised to float32, rows first.

        Raises:
            KeyError: no such weight.
        """
        from gguf import dequantize

        tensor = self._by_hf_name()[name]
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        heads = int(self._required("llama.attention.head_count"))
        if name.endswith("q_proj.weight"):
            return _unpermute(values, heads)
        if name.endswith("k_proj.weight"):
            return _unpermute(values, int(self.field("llama.attention.head_count_kv", heads)))
        return values

    def weights(self) -> "Iterator[tuple[str, NDArray[np.float32]]]":
        """All weights, in the order of the file."""
        for name in self.weight_names():
            yield name, self.weight(name)

    def _by_hf_name(self) -> dict[str, Any]:
        return {_hf_name(n): t for n, t in self._tensors.items() if n != _ROPE_FACTORS}

    def _required(self, key: str) -> Any:
        value = self.field(key)
        if value is None:
            raise ConfigError(f"{self.path.name} lacks the metadata key {key}.")
        return value

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self.field("llama.rope.scaling.type", "none")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._required("llama.rope.scaling.factor")}
        if kind != "none":
            raise ConfigError(
                f"{self.path.name} scales RoPE by {kind!r}, which is not read from GGUF. "
                "Use the model's safetensors folder instead."
            )
        tensor = self._tensors.get(_ROPE_FACTORS)
        if tensor is None:
            return None
        return _llama3_scaling(tensor.data, theta, head_dim, self.path.name)


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"
    elif stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    raise ConfigError(f"GGUF tensor {name!r} has no place in the llama architecture.")


def _unpermute(values: "NDArray[np.float32]", heads: int) -> "NDArray[np.float32]":
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _short(value: float) -> float:
    """Undo float32 storage of a decimal constant: 9.99999974e-06 was written as 1e-5."""
    return float(f"{value:.6g}")


def _llama3_scaling(
    stored: "NDArray[np.float32]", theta: float, head_dim: int, file_name: str
) -> dict[str, Any]:
    """Find the llama3 rope settings whose factors are the ones that the file stores.

    The file keeps only the resulting factors. All published models of the kind share every setting
    but the factor, which is the largest one stored; the guess must reproduce all of them.
    """
    settings = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factor, low, high, length = (float(v) for v in list(settings.values())[1:])  # type: ignore[arg-type]
    for i, actual in enumerate(stored):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(max((length / wavelength - low) / (high - low), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if abs(expected - float(actual)) > 1e-3 * expected:
            raise ConfigError(
                f"{file_name} stores RoPE factors that fit no known scaling. "
                "Use the model's safetensors folder instead."
            )
    return settings


_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Source: tokenizer.json of Llama 3."""


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if kind == "llama-bpe":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raise ConfigError(
        f"GGUF pre-tokenizer {kind!r} is not known. "
        "Use the model's folder with tokenizer.json instead."
    )


def _prepend(bos: str, bos_id: int) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
