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
        share = expert_share(experts, group.rank, group.size)
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
        weights, outputs = self._on_gpu(x) if self._fused else self._in_torch(x)
        # A product, so that narrow types are summed in float32.
        part = torch.bmm(weights.unsqueeze(1), outputs.view(*weights.shape, -1)).squeeze(1)
        return self._group.all_reduce_(part)

    def _in_torch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of each token's experts, [T, per_token], and their outputs.

        Returns:
            Outputs are [T * per_token, hidden_size], zeros where the expert is another rank's.
        """
        experts = self._experts
        shares = self.router(x).softmax(-1, dtype=torch.float32)
        weights, chosen = shares.topk(experts.per_token, -1)
        if experts.normalised:
            weights /= weights.sum(-1, keepdim=True)
        pairs = chosen.flatten()
        counts = torch.bincount(pairs, minlength=experts.count).tolist()
        by_expert = pairs.argsort(stable=True).split(counts)
        outputs = x.new_zeros(len(pairs), x.shape[1])
        for index in range(len(self.down)):
            own = by_expert[self._first + index]
            if len(own):
                gate_up = functional.linear(x[own // experts.per_token], self.gate_up[index])
                inner = functional.silu(gate_up[:, : self._inner])
                inner.mul_(gate_up[:, self._inner :])
                outputs[own] = functional.linear(inner, self.down[index])
        return weights.to(x.dtype), outputs

    def _on_gpu(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in kernels that a graph can replay."""
        from engine.cuda.kernels.experts import choose, expert_products, gather

        experts = self._experts
        weights, chosen = choose(self.router(x), experts.per_token, normalised=experts.normalised)
        gathered = gather(chosen, first=self._first, count=len(self.down), total=experts.count)
        inner = expert_products(x, self.gate_up, gathered, per_row=experts.per_token, gated=True)
        return weights, expert_products(inner, self.down, gathered, per_row=1, gated=False)


_PARTS = ("gate", "up", "down")
