"""Mamba's block: two branches of twice the width, a short convolution and a selective scan in one of them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer, ShortConvolution, first_steps
from effattn_lite.ops.mamba import mamba, step


class Mamba(Mixer):
    r"""Mamba's block: :math:`y = W_O\,\bigl(\mathrm{SiLU}(z) \odot \mathrm{SSM}(u)\bigr)`,
    :math:`u = \mathrm{SiLU}(\mathrm{conv}(x))`, :math:`(x, z) = W_I x'`.

    All that selects follows from u: :math:`(r, B, C) = W_X u` and
    :math:`\Delta = \mathrm{softplus}(W_\Delta r + b_\Delta)`, where r has few entries. The rates
    :math:`A = -e^{A_{\log}}` begin as -1, -2, ..., -M, the steps between 0.001 and 0.1.

    Args:
        width: D.
        heads: as every layer takes it; it changes nothing, since every channel is a head of its own.
        expand: channels of a branch over D.
        states: M, numbers that a channel keeps.
        conv_size: taps of the convolution.
        rank: entries of r; default D / 16, rounded up.
        norm_eps: RMS-normalise r, B and C, with this added to the mean square; None does not.
        norm_weight: these norms have learned weights.
        impl: as in the op.

    Cost: 6 B T D^2 expand FLOPs of the outer projections, 2 B T D expand (2 rank + 2 M) of the inner ones,
    plus the op's.
    Cache: the state [N, expand D, M], float32, and the convolution's tail; its size does not grow.
    Source: Gu and Dao 2023, arXiv:2312.00752, with first values and biases of the released code; the norms by
    Lieber et al. 2024, arXiv:2403.19887.
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
        norm_eps: float | None = None,
        norm_weight: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        inner = expand * width
        self.states, self.rank, self.impl = states, rank or math.ceil(width / 16), impl
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, conv_size, bias=True)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        sizes = (self.rank, states, states) if norm_eps is not None else ()
        self.norms = nn.ModuleList(nn.RMSNorm(n, norm_eps, elementwise_affine=norm_weight) for n in sizes)
        rates = torch.arange(1, states + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(first_steps(inner))

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        y, z, cache = self.scan(x, cache, cu_seqlens=cu_seqlens)
        return self.out_proj(y * F.silu(z)), cache

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        y, z, cache = self.scan_step(x, cache)
        return self.out_proj(y * F.silu(z)), cache

    def scan(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """What the block knows before its gate: SSM(u) and z, [B, T, expand D] each, and the cache."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self.conv.prefill(u, cache["tail"] if cache else None, cu_seqlens=cu_seqlens)
        y, state = mamba(
            u,
            *self._select(u),
            D=self.D,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return y, z, {"state": state, "tail": tail}

    def scan_step(
        self, x: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """As `scan`, of one token, x [B, D]."""
        if not cache:
            y, z, cache = self.scan(x[:, None])
            return y[:, 0], z[:, 0], cache
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self.conv.step(u, cache["tail"])
        y, state = step(u, *self._select(u), D=self.D, state=cache["state"], impl=self.impl)
        return y, z, {"state": state, "tail": tail}

    def _select(self, u):
        r, B, C = self.x_proj(u).split((self.rank, self.states, self.states), dim=-1)
        if self.norms:
            r, B, C = (norm(x) for norm, x in zip(self.norms, (r, B, C), strict=True))
        # a step is an exponent's factor: wide
        dt = F.softplus(self.dt_proj(r).to(torch.promote_types(u.dtype, torch.float32)))
        return dt, -self.A_log.exp(), B.to(u.dtype), C.to(u.dtype)
