"""Longhorn's block: Mamba's, with an online regression in the place of the state space model."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer, ShortConvolution, split_heads
from effattn_lite.ops.longhorn import longhorn, step


class Longhorn(Mixer):
    r"""Longhorn's block: :math:`y = W_O\,\bigl(\mathrm{SiLU}(z) \odot (o + D \odot v)\bigr)`,
    :math:`v = \mathrm{SiLU}(\mathrm{conv}(x))`, :math:`(x, z) = W_I x'`.

    Query, key and weight follow from the value: :math:`(r, k, q) = W_X v` and
    :math:`\beta = \sigma(W_\beta r + b_\beta)`, where r has few entries. No rate of decay is learned.

    Args:
        width: D.
        heads: H, each with its own q and k; the authors have one.
        expand: channels of a branch over D; V = expand D / H.
        states: K of a head.
        conv_size: taps of the convolution.
        rank: entries of r; default D / 16, rounded up.
        impl: as in the op.

    Cost: 6 B T D^2 expand FLOPs of the outer projections, 2 B T D expand (2 rank + 2 H K) of the inner ones,
    plus the op's.
    Cache: the state [N, H, K, V], float32, and the convolution's tail; its size does not grow.
    Source: Liu et al. 2024, arXiv:2407.14207, and the released code.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        expand: int = 2,
        states: int = 16,
        conv_size: int = 4,
        rank: int | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        inner = expand * width
        if inner % heads:
            raise ValueError(f"expand * width is {inner}, expected a multiple of heads = {heads}")
        self.heads, self.states, self.impl = heads, states, impl
        self.rank = rank or math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, conv_size, bias=True)
        self.x_proj = nn.Linear(inner, self.rank + 2 * heads * states, bias=False)
        self.beta_proj = nn.Linear(self.rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.zeros_(self.beta_proj.bias)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        v, z = self.in_proj(x).chunk(2, dim=-1)
        v, tail = self.conv.prefill(v, cache["tail"] if cache else None, cu_seqlens=cu_seqlens)
        q, k, beta = self._project(v)
        o, state = longhorn(
            q,
            k,
            split_heads(v, self.heads),
            beta=beta,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(o, v, z), {"state": state, "tail": tail}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        v, z = self.in_proj(x).chunk(2, dim=-1)
        v, tail = self.conv.step(v, cache["tail"])
        q, k, beta = self._project(v)
        o, state = step(q, k, split_heads(v, self.heads), beta=beta, state=cache["state"], impl=self.impl)
        return self._output(o, v, z), {"state": state, "tail": tail}

    def _project(self, v):
        size = self.heads * self.states
        r, k, q = self.x_proj(v).split((self.rank, size, size), dim=-1)
        beta = self.beta_proj(r).to(torch.promote_types(v.dtype, torch.float32)).sigmoid()
        return *(split_heads(y.to(v.dtype), self.heads) for y in (q, k)), split_heads(beta, self.heads)

    def _output(self, o, v, z):
        return self.out_proj((o.flatten(-2) + self.D.to(v.dtype) * v) * F.silu(z))
