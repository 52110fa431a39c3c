"""The feed-forward part of a decoder layer that has experts: a router, and a few of many MLPs.

Every rank holds the whole router and so chooses alike. Experts are shared out whole where their
number allows it, and otherwise cut as a dense layer is; either way a rank's output is a part of the
sum that the layer makes over all ranks.
"""

import torch
from torch.nn import functional

from engine.cuda.support import has_triton
from engine.layers.linear import Linear
from engine.loader.source import WeightSource
from engine.models.config import ExpertsConfig
from engine.parallel.group import RankGroup
from engine.parallel.shares import expert_share


class ExpertMLP:
    """Sum over a token's experts of weight * down(silu(gate(x)) * up(x)).

    Source: arXiv:2401.04088, section 2.1; the router as in transformers: softmax in float32 over
    all experts, then the largest, divided by their sum for models that do so.
    """

    def __init__(
        self,
        source: WeightSource,
        prefix: str,
        hidden_size: int,
        experts: ExpertsConfig,
        group: RankGroup,
    ) -> None:
        """Load `prefix`.gate and this rank's share of `prefix`.experts."""
        self._group = group
        self._experts = experts
        share = expert_share(experts, group)
        self._first = share.first
        self._inner = share.intermediate_size
        self.router = Linear(source.get(f"{prefix}.gate.weight", experts.count, hidden_size))
        weight = self.router.weight
        self.gate_up = weight.new_empty(share.count, 2 * self._inner, hidden_size)
        """[this rank's experts, its rows of gate, then of up, hidden_size]"""
        self.down = weight.new_empty(share.count, hidden_size, self._inner)
        rows, columns = (source, source) if share.whole else (source.split(0), source.split(1))
        size = experts.intermediate_size
        for expert in range(experts.count):
            names = [f"{prefix}.experts.{expert}.{part}_proj.weight" for part in _PARTS]
            index = expert - share.first
            if not 0 <= index < share.count:
                for name in names:
                    source.skip(name)
                continue
            gate, up, down = names
            self.gate_up[index, : self._inner] = rows.get(gate, size, hidden_size)
            self.gate_up[index, self._inner :] = rows.get(up, size, hidden_size)
            self.down[index] = columns.get(down, hidden_size, size)
        self._fused = has_triton(source.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        weights, chosen = self._route(x)
        outputs = self._each(x, chosen)
        # A product, so that narrow types are summed in float32.
        part = torch.bmm(weights.unsqueeze(1), outputs).squeeze(1)
        return self._group.all_reduce_(part)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of each token's experts, and which they are, [T, per_token] int64."""
        shares = self.router(x).softmax(-1, dtype=torch.float32)
        weights, chosen = shares.topk(self._experts.per_token, -1)
        if self._experts.normalised:
            weights /= weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def _each(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Outputs of each token's experts, [T, per_token, hidden_size]; zeros of other ranks'."""
        pairs = chosen.flatten()
        order = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=self._experts.count).tolist()
        outputs = x.new_zeros(len(pairs), x.shape[1])
        groups = order.split(counts)[self._first : self._first + len(self.down)]
        for index, group in enumerate(groups):
            if len(group):
                gate_up = functional.linear(x[group // chosen.shape[1]], self.gate_up[index])
                inner = functional.silu(gate_up[:, : self._inner])
                inner.mul_(gate_up[:, self._inner :])
                outputs[group] = functional.linear(inner, self.down[index])
        return outputs.view(*chosen.shape, -1)


_PARTS = ("gate", "up", "down")
