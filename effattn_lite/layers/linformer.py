"""Linformer's mixer: multi-head attention to learned mixtures of the text, which must not be too long."""

import torch
from torch import nn

from effattn_lite.layers.common import split_heads
from effattn_lite.ops.linformer import linformer


class Linformer(nn.Module):
    r"""Multi-head attention whose keys and values are projected along the text: :math:`y = W_O\, o`.

    It is for encoders: every token sees every other, so there is no prefill and no step.

    Args:
        width: D.
        heads: H; all share the two projections.
        max_length: L, longest text in tokens.
        rank: M, rows that a text is projected to.
        shared: project keys and values by one matrix.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: none.
    Source: Wang et al. 2020, arXiv:2006.04768: the sharing between heads, and that between keys and values.
    """

    def __init__(
        self, width: int, heads: int, *, max_length: int = 512, rank: int = 64, shared: bool = False,
        impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        # first values as those of a linear layer of max_length inputs
        bound = max_length**-0.5
        self.e = nn.Parameter(torch.empty(max_length, rank).uniform_(-bound, bound))
        self.f = self.e if shared else nn.Parameter(torch.empty(max_length, rank).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result."""
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        e, f = self.e.to(q.dtype), self.f.to(q.dtype)
        o = linformer(q, k, v, e=e, f=f, cu_seqlens=cu_seqlens, impl=self.impl)
        return self.o_proj(o.flatten(2))
