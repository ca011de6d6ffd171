"""Mamba-2's block: one projection to everything, a short convolution, the state space model, a gated norm."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, ShortConvolution, split_heads
from effattn_lite.ops.mamba2 import mamba2, step


class Mamba2(Mixer):
    r"""Mamba-2's block: :math:`y = W_O\,\mathrm{norm}(\mathrm{SiLU}(z) \odot (o + D \odot x))`.

    One projection gives z, x, B, C and dt; x, B and C pass a short convolution. With
    :math:`\Delta = \mathrm{softplus}(dt + b)` and :math:`A = -e^{a}`, a number a head, the op gets
    q = C, k = B, :math:`v = \Delta x` and :math:`g = \Delta A`.

    Args:
        width: D.
        heads: HV value heads, of expand D / HV channels each; 64 in the released models.
        state: K, the paper's N.
        groups: H heads of B and C, a divisor of HV; also the groups of the norm.
        expand: width of x and z over D.
        taps: tokens that the convolution sees.
        impl: as in the op.

    Cost: 2 B T D (3 expand D + 2 H K + HV) FLOPs of projections, plus the convolution's and the op's.
    Cache: the state [N, HV, K, V], float32, and the convolution's tail; its size does not grow.
    Source: Dao and Gu 2024, arXiv:2405.21060; order of the projection and first values as released with it.
    """

    def __init__(
        self, width: int, heads: int, *, state: int = 128, groups: int = 1, expand: int = 2, taps: int = 4,
        impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        inner, shared = expand * width, groups * state
        if inner % heads or heads % groups:
            raise ValueError(
                f"heads is {heads}, expected a divisor of {inner} and a multiple of {groups} groups"
            )
        self.heads, self.groups, self.impl = heads, groups, impl
        self.parts = (inner, inner + 2 * shared, heads)
        self.channels = (inner, shared, shared)
        self.in_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.conv = ShortConvolution(inner + 2 * shared, taps, bias=True)
        # steps log-uniform between 0.001 and 0.1, decays uniform: half-lives from a token to a few hundred
        steps = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = HeadNorm(groups, inner // groups)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        z, mixed, dt = self.in_proj(x).split(self.parts, dim=-1)
        mixed, tail = self.conv.prefill(mixed, cache["tail"] if cache else None, cu_seqlens=cu_seqlens)
        q, k, v, g, skip = self._discretise(mixed, dt)
        o, state = mamba2(
            q,
            k,
            v,
            g=g,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(o + skip, z), {"state": state, "tail": tail}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        z, mixed, dt = self.in_proj(x).split(self.parts, dim=-1)
        mixed, tail = self.conv.step(mixed, cache["tail"])
        q, k, v, g, skip = self._discretise(mixed, dt)
        o, state = step(q, k, v, g=g, state=cache["state"], impl=self.impl)
        return self._output(o + skip, z), {"state": state, "tail": tail}

    def _discretise(self, mixed, dt):
        x, B, C = mixed.split(self.channels, dim=-1)
        x = split_heads(x, self.heads)
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)  # [..., HV]
        v, skip = ((x * weight).to(x.dtype) for weight in (dt[..., None], self.D[:, None]))
        return split_heads(C, self.groups), split_heads(B, self.groups), v, -dt * self.A_log.exp(), skip

    def _output(self, y, z):
        y = split_heads(F.silu(z) * y.flatten(-2), self.groups)
        return self.out_proj(self.norm(y).flatten(-2))
