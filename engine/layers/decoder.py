"""The stack that dense decoder-only models are: embedding, layers, final norm, LM head."""

import torch

from engine.layers.attention import SelfAttention
from engine.layers.context import ForwardContext
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.loader.source import WeightSource
from engine.models.config import ModelConfig


class DecoderLayer:
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, source: WeightSource, config: ModelConfig, layer: int, pack: bool) -> None:
        """Load `model.layers.{layer}`."""
        prefix = f"model.layers.{layer}"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(source, f"{prefix}.input_layernorm", hidden, eps)
        self.attention = SelfAttention(source, f"{prefix}.self_attn", config, layer, pack)
        self.mlp_norm = RMSNorm(source, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = GatedMLP(source, f"{prefix}.mlp", config, pack)

    def __call__(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Add this layer's contributions to `hidden` [T, hidden_size] in place; returns it."""
        hidden.add_(self.attention(self.input_norm(hidden), context))
        return hidden.add_(self.mlp(self.mlp_norm(hidden)))


class DecoderModel:
    """Token ids in, hidden states out; logits only for the rows that are to be sampled."""

    def __init__(self, source: WeightSource, config: ModelConfig, *, pack: bool) -> None:
        """Load all weights.

        Args:
            source: of the checkpoint.
            config: of the model.
            pack: keep blocked copies of the matrices, see `Linear`.

        Raises:
            ConfigError: weights are missing, misshapen or left over.
        """
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = source.get("model.embed_tokens.weight", *shape)
        self.layers = [
            DecoderLayer(source, config, layer, pack) for layer in range(config.num_layers)
        ]
        self.norm = RMSNorm(source, "model.norm", config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        head = self.embedding if tied else source.get("lm_head.weight", *shape)
        self.lm_head = Linear(head, pack=pack)
        # Some tied checkpoints store the shared matrix a second time.
        source.finish(ignored=("lm_head.weight",) if tied else ())

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Run the layers.

        Args:
            token_ids: [T] int64.
            context: of this step.

        Returns:
            [T, hidden_size], before the final norm.
        """
        hidden = self.embedding.index_select(0, token_ids)
        for layer in self.layers:
            hidden = layer(hidden, context)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] -> [N, vocab_size]."""
        return self.lm_head(self.norm(hidden))
