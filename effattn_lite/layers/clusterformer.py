"""ClusterFormer's mixer: words attend in blocks sorted by clusters that are learned with the task."""

import torch
from torch import nn

from effattn_lite.layers.common import split_heads
from effattn_lite.ops.clusterformer import cluster, clusterformer


class ClusterFormer(nn.Module):
    r"""Attention within clusters between a Transformer's projections: :math:`y = W_O\, o`.

    It is for encoders: every token sees others behind it, so there is no prefill and no step. The output
    does not differentiate the choice of clusters: add `loss` to that of the task.

    Args:
        width: D.
        heads: H; all share the clusters.
        clusters: M; near sqrt(T) the cost is smallest.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: none.
    Source: Wang et al. 2022, doi 10.18653/v1/2022.acl-long.170; what is this book's reading of it, `cluster`
        and the op say.
    """

    def __init__(self, width: int, heads: int, *, clusters: int = 16, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.c = nn.Parameter(torch.randn(clusters, width))
        self.w = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: torch.Tensor, c: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result.

        c: centroids [B, M, D] that the layer before has moved; default this layer's own.
        """
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.to(x.dtype) for y in (q, k, v))
        c = self.c[None] if c is None else c
        o = clusterformer(q, k, v, x=x, centroids=c, w=self.w, cu_seqlens=cu_seqlens, impl=self.impl)
        return self.o_proj(o.flatten(2))

    def move(self, x: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Centroids [B, M, D] for the layer behind, of x [B, T, D] that is not packed."""
        return cluster(x, centroids=self.c[None] if c is None else c, w=self.w)[0]

    def loss(self, x: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        r"""What the clustering itself must make small, for x [B, T, D] that is not packed.

        .. math:: -\operatorname{mean}_t \cos(x_t, C'_{a_t}) - \operatorname{mean}_m \cos(C'_m, C'_{m+1})

        Words shall be like the centroid of their cluster, and neighbouring centroids, whose blocks attend to
        one another, like each other.
        """
        moved, choice = cluster(x, centroids=self.c[None] if c is None else c, w=self.w)
        mine = moved.gather(1, choice[..., None].expand(*choice.shape, moved.shape[2]))
        loss = -torch.cosine_similarity(x.to(moved.dtype), mine, dim=-1).mean()
        if moved.shape[1] > 1:
            loss = loss - torch.cosine_similarity(moved[:, 1:], moved[:, :-1], dim=-1).mean()
        return loss
