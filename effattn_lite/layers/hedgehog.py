"""Hedgehog's mixer: attention as in a Transformer, its softmax mimicked by learned features."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, GroupedAttention
from effattn_lite.ops.hedgehog import features, hedgehog, step


class Hedgehog(GroupedAttention):
    r"""Hedgehog's attention of every head between a Transformer's projections: :math:`y = W_O\, o`.

    The maps begin as the identity; `distill` trains them to the weights of a softmax attention.

    Args:
        width: D.
        heads: H; K = V = D / H.
        rows: M, rows of the maps and half the features; default K.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: S [N, H, 2 M, V] and z [N, H, 2 M], float32; their size does not grow.
    Source: Zhang et al. 2024, arXiv:2402.04347.
    """

    def __init__(self, width: int, heads: int, *, rows: int | None = None, impl: str = "auto"):
        super().__init__(width, heads)
        self.impl = impl
        rows = rows or self.head_dim
        identity = torch.eye(rows, self.head_dim).repeat(heads, 1, 1)
        self.wq, self.wk = nn.Parameter(identity), nn.Parameter(identity.clone())
        self.bq, self.bk = nn.Parameter(torch.zeros(heads, rows)), nn.Parameter(torch.zeros(heads, rows))

    def distill(self, x: torch.Tensor) -> torch.Tensor:
        r"""How far the weights are from those of softmax attention: mean cross-entropy of a row, in nats.

        .. math:: -\frac{1}{B T H} \sum_{t} \sum_{j \le t} a_{tj} \log
            \frac{\phi(q_t) \cdot \phi(k_j)}{\sum_{i \le t} \phi(q_t) \cdot \phi(k_i)}

        with a the softmax of q . k / sqrt(K). The projections of x, [B, T, D], get no gradient.

        Source: Zhang et al. 2024, arXiv:2402.04347.
        """
        q, k = (z.detach() for z in self.project(x)[:2])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        score = torch.einsum("bthk,bjhk->bhtj", q, k) * self.head_dim**-0.5
        a = score.masked_fill(~mask, float("-inf")).softmax(-1)
        phi_q, phi_k = features(q, self.wq, self.bq), features(k, self.wk, self.bk)
        weights = torch.einsum("bthm,bjhm->bhtj", phi_q, phi_k).masked_fill(~mask, 0)
        log = (weights / weights.sum(-1, keepdim=True)).clamp(min=1e-30).log()
        return -(a * log).sum(-1).mean()

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, (S, z) = hedgehog(
            *self.project(x),
            **self._maps(),
            initial_state=(cache["S"], cache["z"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o.flatten(2)), {"S": S, "z": z}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, (S, z) = step(*self.project(x), **self._maps(), state=(cache["S"], cache["z"]), impl=self.impl)
        return self.o_proj(o.flatten(1)), {"S": S, "z": z}

    def _maps(self):
        return dict(wq=self.wq, wk=self.wk, bq=self.bq, bk=self.bk)
