"""Luna's mixer: the text is packed by learned queries, and what they hold can go on to the next layer."""

import torch
from torch import nn

from effattn_lite.layers.common import split_heads
from effattn_lite.ops.luna import luna, weights


class Luna(nn.Module):
    r"""Nested attention: :math:`y = W_O\,\mathrm{Attn}(W_Q x, W_K Y_P, W_V Y_P)`, with the packed
    :math:`Y_P = \operatorname{softmax}(D^{-1/2}\, (W_P P)\, X^\top)\, X`.

    It is for encoders: every token sees every other, so there is no prefill and no step.

    Args:
        width: D.
        heads: H, of the second attention; the first has one, over the whole width.
        packed: M, packing queries.
        impl: as in the op.

    Cost: 2 B T D (4 D + M) FLOPs of projections and packing, plus the op's.
    Cache: none.
    Source: Ma et al. 2021, arXiv:2106.01540; one pack head and biases, but that of the keys, are from the
    authors' code. Differs: keys and values are projected before they are packed, which gives the same.
    """

    def __init__(self, width: int, heads: int, *, packed: int = 16, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.p = nn.Parameter(torch.randn(packed, width) * width**-0.5)
        self.p_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        # a bias would add the same to all scores of a query, since rows of A sum to 1
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, p: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result.

        p: packing queries [B, M, D] that a layer before has left; default this layer's own.
        """
        queries = self._queries(x, p)
        if cu_seqlens is None:
            queries = queries.expand(x.shape[0], *queries.shape[1:])
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        c = x[:, :, None].to(q.dtype)
        o = luna(q, k, v, c=c, p=queries, cu_seqlens=cu_seqlens, impl=self.impl)
        return self.o_proj(o.flatten(2))

    def pack(self, x: torch.Tensor, p: torch.Tensor | None = None) -> torch.Tensor:
        """Y_P [B, M, D], what the packing queries hold of x [B, T, D].

        The next layer's queries are LN(Y_P + P); that norm and that sum are the block's.
        """
        queries = self._queries(x, p)
        A = weights(queries.expand(x.shape[0], *queries.shape[1:]), x[:, :, None].to(queries.dtype))
        return torch.einsum("bmhj,bjd->bmd", A, x.to(A.dtype))

    def _queries(self, x, p):
        # [1 or B, M, 1, D]: one pack head
        return self.p_proj(self.p[None] if p is None else p)[:, :, None]
