"""Small random checkpoints in Hugging Face form, complete enough to be served and to chat."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
_TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Prefill reads the prompt once; decode writes one token after another.",
    "Der Fluss fließt durch die Stadt und weiter bis ans Meer.",
    "La mémoire garde ce que le calcul a déjà fait.",
    "def add(a, b):\n    return a + b\n",
]


def make_checkpoint(
    folder: Path, arch: str = "LlamaForCausalLM", seed: int = 0, **overrides: Any
) -> Path:
    """Write a random model with its tokenizer.

    Args:
        folder: parent; the checkpoint becomes a folder in it.
        arch: one of those that the engine knows.
        seed: of the weights.
        overrides: values of config.json.

    Returns:
        The checkpoint's folder. Weights are large enough for greedy outputs to vary and for the two
        most likely tokens to lie well apart.
    """
    target = folder / f"{MODEL_TYPES[arch]}-{seed}"
    target.mkdir(parents=True)
    tokenizer = make_tokenizer()
    config: dict[str, Any] = {
        "architectures": [arch],
        "model_type": MODEL_TYPES[arch],
        "hidden_act": "silu",
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "pad_token_id": 0,
        **EXPERTS.get(arch, {}),
        **overrides,
    }
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "bos_token": "<|im_start|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    tokenizer.save(str(target / "tokenizer.json"))
    save_file(random_weights(config, seed), target / "model.safetensors", {"format": "pt"})
    return target


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Every weight that transformers expects for `config`, float32."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values * (scale / math.sqrt(columns))

    def vector(size: int, mean: float) -> torch.Tensor:
        return mean + 0.2 * torch.randn(size, generator=generator)

    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads = {
        "q": config["num_attention_heads"] * head_dim,
        "k": config["num_key_value_heads"] * head_dim,
        "v": config["num_key_value_heads"] * head_dim,
    }
    model_type = config["model_type"]
    attention_bias = config.get("attention_bias", False)
    # A tied model with large embeddings would only repeat its last token.
    scale = 2.0 if config["tie_word_embeddings"] else 8.0
    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, scale)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, rows in heads.items():
            weights[f"{name}.self_attn.{part}_proj.weight"] = matrix(rows, hidden, 1.5)
            if model_type == "qwen2" or attention_bias:
                weights[f"{name}.self_attn.{part}_proj.bias"] = vector(rows, 0.0)
        weights[f"{name}.self_attn.o_proj.weight"] = matrix(hidden, heads["q"])
        if attention_bias and model_type != "qwen2":
            weights[f"{name}.self_attn.o_proj.bias"] = vector(hidden, 0.0)
        if model_type in ("qwen3", "qwen3_moe"):
            for part in ("q", "k"):
                weights[f"{name}.self_attn.{part}_norm.weight"] = vector(head_dim, 1.0)
        for prefix, size in _feed_forwards(config, layer).items():
            shapes = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
            for part, (rows, columns) in shapes.items():
                own = _MIXTRAL_PARTS[part] if "block_sparse" in prefix else f"{part}_proj"
                weights[f"{name}.{prefix}.{own}.weight"] = matrix(rows, columns)
                if config.get("mlp_bias"):
                    weights[f"{name}.{prefix}.{own}.bias"] = vector(rows, 0.0)
        if len(prefixes := _feed_forwards(config, layer)) > 1:
            # So large that rounding, which no two ways of computing share, chooses no expert: over
            # the prompts of the end-to-end tests, choices are 14 times as far apart as it reaches.
            router = next(iter(prefixes)).replace(".experts.0", ".gate.weight")
            weights[f"{name}.{router}"] = matrix(len(prefixes), hidden, 5.0)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = vector(hidden, 1.0)
    weights["model.norm.weight"] = vector(hidden, 1.0)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 4.0)
    if model_type == "phi3":
        _fuse(weights, "self_attn", ("q", "k", "v"))
        _fuse(weights, "mlp", ("gate", "up"))
    return weights


def _fuse(weights: dict[str, torch.Tensor], module: str, parts: tuple[str, ...]) -> None:
    """Store matrices of each layer as one, which is named after all of them."""
    for first in [name for name in weights if name.endswith(f"{module}.{parts[0]}_proj.weight")]:
        prefix = first.removesuffix(f"{parts[0]}_proj.weight")
        matrices = [weights.pop(f"{prefix}{part}_proj.weight") for part in parts]
        fused = "".join(parts) if module == "self_attn" else "_".join(parts)
        weights[f"{prefix}{fused}_proj.weight"] = torch.cat(matrices)


def _feed_forwards(config: dict[str, Any], layer: int) -> dict[str, int]:
    """Name within the layer -> inner size: of the dense one, or of each expert."""
    inner = config["intermediate_size"]
    if config["model_type"] == "mixtral":
        count = config["num_local_experts"]
        return {f"block_sparse_moe.experts.{expert}": inner for expert in range(count)}
    if config["model_type"] == "qwen3_moe":
        sparse = (layer + 1) % config["decoder_sparse_step"] == 0
        if sparse and layer not in config["mlp_only_layers"]:
            inner, count = config["moe_intermediate_size"], config["num_experts"]
            return {f"mlp.experts.{expert}": inner for expert in range(count)}
    return {"mlp": inner}


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of 384 tokens, the first three of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        show_progress=False,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def make_gguf(checkpoint: Path) -> Path:
    """Write a checkpoint of LlamaForCausalLM as a GGUF file next to its folder."""
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    path = checkpoint.with_suffix(".gguf")
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        part = name.split(".")[-2]
        if part in heads:
            pairs = weight.reshape(heads[part], 2, -1, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(_gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def _gguf_name(name: str) -> str:
    parts = name.split(".")
    prefix = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{prefix}{_GGUF_PARTS[parts[-2]]}.{parts[-1]}"
