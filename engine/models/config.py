"""What a model is made of: the facts of config.json that shape computation, checked once.

The loader reads it; models and layers only look. A feature that is not supported is refused here by
name, so that nothing is silently computed wrong.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from core.errors import ConfigError
from core.modelfile.description import read_config, read_eos_token_ids

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; fields past `theta` matter only to the kinds that use them."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """yarn: scale of cos and sin; None derives it from `factor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A feed-forward of several experts, of which a router chooses a few for each token."""

    count: int
    per_token: int
    """How many are chosen."""
    intermediate_size: int
    """Of each."""
    normalised: bool
    """The weights of a token's experts sum to one; else they are what softmax gives over all."""
    layers: frozenset[int]
    """Which layers have them; the others are dense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of layers without experts."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence in tokens."""
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Of o_proj."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over head_dim on q and k, before RoPE."""
    dtype: str
    """Of the checkpoint, as torch names it."""
    eos_token_ids: tuple[int, ...]
    experts: ExpertsConfig | None = None
    """None: every layer is dense."""
    sliding_window: int | None = None
    """Tokens that a position attends to, itself among them, where this bounds `max_position`."""

    @property
    def has_dense_layers(self) -> bool:
        """True unless all layers have experts."""
        return self.experts is None or len(self.experts.layers) < self.num_layers

    @property
    def length_bound(self) -> str:
        """Why sequences are no longer than `max_position`, for messages."""
        if self.sliding_window is None:
            return f"the model knows positions up to {self.max_position}"
        return (
            f"the model attends to the last {self.sliding_window} tokens (sliding_window in "
            "config.json), and sequences beyond this window are not supported"
        )


def read_model_config(path: Path) -> ModelConfig:
    """Read a folder's or .gguf file's configuration.

    Raises:
        ConfigError: missing values, or an architecture or feature that is not supported.
    """
    return parse_model_config(read_config(path), read_eos_token_ids(path))


def parse_model_config(raw: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """Check a config.json and take from it what computation needs.

    Raises:
        ConfigError: see `read_model_config`.
    """
    architecture = (raw.get("architectures") or ["(none)"])[0]
    traits = _TRAITS.get(architecture)
    if traits is None:
        raise ConfigError(
            f"Architecture {architecture} is not supported; these are: {', '.join(_TRAITS)}."
        )
    raw = {**traits.defaults, **raw}
    _refuse_unsupported(raw)
    hidden_size = _integer(raw, "hidden_size")
    num_heads = _integer(raw, "num_attention_heads")
    attention_bias = bool(raw.get("attention_bias", False))
    max_position = _integer(raw, "max_position_embeddings")
    window = _bounding_window(raw, max_position) if traits.always_slides else None
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        max_position=window or max_position,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, traits.rope_kinds),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=traits.always_qkv_bias or attention_bias,
        output_bias=attention_bias and not traits.always_qkv_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=traits.qk_norm,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=eos_token_ids,
        experts=traits.experts(raw),
        sliding_window=window,
    )


def _bounding_window(raw: Mapping[str, Any], max_position: int) -> int | None:
    """The window of attention in all layers, if it is shorter than the positions reach.

    Up to its length, attention within it is attention to everything.
    """
    if raw.get("sliding_window") is None:
        return None
    window = _integer(raw, "sliding_window")
    return window if window < max_position else None


def _no_experts(_raw: Mapping[str, Any]) -> None:
    """Of a dense model."""


def _mixtral_experts(raw: Mapping[str, Any]) -> ExpertsConfig:
    return _experts(
        raw,
        intermediate_size=_integer(raw, "intermediate_size"),
        normalised=True,
        layers=range(_integer(raw, "num_hidden_layers")),
    )


def _qwen3_experts(raw: Mapping[str, Any]) -> ExpertsConfig | None:
    dense = set(raw.get("mlp_only_layers") or ())
    step = int(raw.get("decoder_sparse_step") or 1)
    layers = range(step - 1, _integer(raw, "num_hidden_layers"), step)
    found = _experts(
        raw,
        intermediate_size=_integer(raw, "moe_intermediate_size"),
        normalised=bool(raw.get("norm_topk_prob", False)),
        layers=[layer for layer in layers if layer not in dense],
    )
    return found if found.layers else None


def _experts(
    raw: Mapping[str, Any], *, intermediate_size: int, normalised: bool, layers: Iterable[int]
) -> ExpertsConfig:
    # transformers 5 reads and writes either name for every architecture.
    count = _integer(raw, "num_experts" if "num_experts" in raw else "num_local_experts")
    per_token = _integer(raw, "num_experts_per_tok")
    if per_token > count:
        raise ConfigError(
            f"config.json asks for {per_token} experts per token and has {count} experts."
        )
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=intermediate_size,
        normalised=normalised,
        layers=frozenset(layers),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traits:
    """What an architecture fixes without saying so in config.json."""

    always_qkv_bias: bool = False
    qk_norm: bool = False
    always_slides: bool = False
    """`sliding_window` counts wherever it is given; elsewhere `use_sliding_window` switches it."""
    rope_kinds: tuple[RopeKind, ...] = get_args(RopeKind)
    experts: Callable[[Mapping[str, Any]], ExpertsConfig | None] = _no_experts
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that is absent, where that is not what most mean by it."""


_TRAITS = {
    "LlamaForCausalLM": _Traits(),
    "MistralForCausalLM": _Traits(
        always_slides=True, defaults={"sliding_window": 4096, "num_key_value_heads": 8}
    ),
    # The names of other kinds mean longrope there.
    "Phi3ForCausalLM": _Traits(
        always_slides=True, rope_kinds=("default",), defaults={"rms_norm_eps": 1e-5}
    ),
    "Qwen2ForCausalLM": _Traits(always_qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": _Traits(
        qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}
    ),
    "Qwen3MoeForCausalLM": _Traits(
        qk_norm=True, experts=_qwen3_experts, defaults={"num_key_value_heads": 4}
    ),
    "MixtralForCausalLM": _Traits(
        always_slides=True,
        experts=_mixtral_experts,
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
}


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act {activation!r} is not supported, only 'silu' is.")
    if raw.get("use_sliding_window"):
        raise ConfigError(
            "use_sliding_window, a window in some layers, is not supported; if the model was "
            "trained without, set it to false in config.json."
        )
    if "sliding_attention" in (raw.get("layer_types") or ()):
        raise ConfigError("layer_types with sliding_attention are not supported.")
    if raw.get("quantization_config"):
        raise ConfigError("Quantised checkpoints are not supported; use the unquantised one.")
    if raw.get("pretraining_tp", 1) not in (None, 1):
        raise ConfigError("pretraining_tp other than 1 is not supported.")


def _rope(raw: Mapping[str, Any], kinds: Iterable[RopeKind]) -> RopeConfig:
    """Read RoPE settings as transformers writes them: version 5 nests theta, version 4 does not."""
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(nested.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = _rope_kind(nested.get("rope_type") or nested.get("type") or "default", kinds)
    if nested.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported.")
    if kind == "yarn" and (nested.get("mscale") or nested.get("mscale_all_dim")):
        raise ConfigError("RoPE scaling 'yarn' with mscale is not supported.")
    if kind == "yarn" and nested.get("truncate") is False:
        raise ConfigError("RoPE scaling 'yarn' with truncate=false is not supported.")
    attention_factor = nested.get("attention_factor")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(nested.get("factor") or 1.0),
        original_max_len=int(
            nested.get("original_max_position_embeddings")
            or raw.get("original_max_position_embeddings")
            or raw.get("max_position_embeddings")
            or 0
        ),
        low_freq_factor=float(nested.get("low_freq_factor") or 1.0),
        high_freq_factor=float(nested.get("high_freq_factor") or 4.0),
        beta_fast=float(nested.get("beta_fast") or 32.0),
        beta_slow=float(nested.get("beta_slow") or 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
    )


def _rope_kind(name: str, kinds: Iterable[RopeKind]) -> RopeKind:
    for kind in kinds:
        if kind == name:
            return kind
    raise ConfigError(
        f"RoPE scaling {name!r} is not supported for this model; these are: {', '.join(kinds)}."
    )


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json must give {key} as a positive integer, got {value!r}.")
    return value
