"""The stack that decoder-only models are: embedding, layers, final norm, LM head."""

import torch

from engine.layers.attention import SelfAttention
from engine.layers.context import ForwardContext
from engine.layers.experts import ExpertMLP
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.loader.source import WeightSource
from engine.models.config import ModelConfig
from engine.parallel.group import RankGroup


class DecoderLayer:
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        group: RankGroup,
        *,
        layer: int,
        pack: bool,
    ) -> None:
        """Load this rank's share of `model.layers.{layer}`."""
        prefix = f"model.layers.{layer}"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(source, f"{prefix}.input_layernorm", hidden, eps)
        self.attention = SelfAttention(
            source, f"{prefix}.self_attn", config, group, layer=layer, pack=pack
        )
        self.mlp_norm = RMSNorm(source, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp: GatedMLP | ExpertMLP
        if config.experts is not None and layer in config.experts.layers:
            self.mlp = ExpertMLP(source, f"{prefix}.mlp", hidden, config.experts, group)
        else:
            self.mlp = GatedMLP(source, f"{prefix}.mlp", config, group, pack=pack)

    def __call__(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        context: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the layer.

        Args:
            hidden: [T, hidden_size], the residual stream; written.
            delta: [T, hidden_size], still to be added to it; None before the first layer.
            context: of this step.
            rows: [N], the only rows wanted of the last layer; None: all.

        Returns:
            The residual stream and what is to be added to it, [T or N, hidden_size] each: adding
            and the next norm are one operation.
        """
        normed = self.input_norm(hidden) if delta is None else self.input_norm.add_(hidden, delta)
        attended = self.attention(normed, context, rows)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return hidden, self.mlp(self.mlp_norm.add_(hidden, attended))


class DecoderModel:
    """Token ids in, hidden states out; logits only for the rows that are to be sampled.

    Shared among ranks as in arXiv:1909.08053: heads, feed-forward and vocabulary are divided, and
    the residual stream is the same on every rank.
    """

    def __init__(
        self, source: WeightSource, config: ModelConfig, group: RankGroup, *, pack: bool
    ) -> None:
        """Load all weights of this rank.

        Args:
            source: of the checkpoint.
            config: of the whole model.
            group: whose ranks share it.
            pack: keep blocked copies of the matrices, see `Linear`.

        Raises:
            ConfigError: weights are missing, misshapen or left over.
        """
        self.group = group
        self._vocab_size = config.vocab_size
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = source.split(0).get("model.embed_tokens.weight", *shape)
        self.layers = [
            DecoderLayer(source, config, group, layer=layer, pack=pack)
            for layer in range(config.num_layers)
        ]
        self.norm = RMSNorm(source, "model.norm", config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        head = self.embedding if tied else source.split(0).get("lm_head.weight", *shape)
        self.lm_head = Linear(head, pack=pack)
        # Some tied checkpoints store the shared matrix a second time.
        source.finish(ignored=("lm_head.weight",) if tied else ())

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Run the layers and the final norm.

        K and V of all tokens are written; the rest of the last layer is computed only for the rows
        that are wanted, which spares 2 % of a long prompt's arithmetic.

        Args:
            token_ids: [T] int64.
            context: of this step.

        Returns:
            [N, hidden_size] of the context's output rows, normed.
        """
        hidden = self.embed(token_ids)
        delta = None
        for layer in self.layers[:-1]:
            hidden, delta = layer(hidden, delta, context)
        hidden, delta = self.layers[-1](hidden, delta, context, context.output_rows)
        return self.norm.add_(hidden, delta)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size], normed -> [N, vocab_size], contiguous."""
        return self.gathered(self.lm_head(hidden))

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """This rank's part of logits [N, vocab_size / ranks] -> all, as `logits`."""
        return self.group.all_gather(part)[:, : self._vocab_size].contiguous()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size], a tensor of its own."""
        if self.group.size == 1:
            return self.embedding.index_select(0, token_ids)
        num_rows = len(self.embedding)
        row = token_ids - self.group.rank * num_rows
        elsewhere = (row < 0) | (row >= num_rows)
        found = self.embedding.index_select(0, row.clamp(0, num_rows - 1))
        return self.group.all_reduce_(found.masked_fill_(elsewhere[:, None], 0))
