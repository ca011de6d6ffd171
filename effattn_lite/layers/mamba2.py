"""Mamba-2's block: one projection to everything, a short convolution, the state space model, a gated norm."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, ShortConvolution, first_steps, split_heads
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
        head_dim: V, channels of a head; default expand D / HV.
        norm: "after" or "before" the gate, or None.
        norm_eps: added to its mean square.
        bias: of both projections.
        conv_bias: of the convolution.
        steps: smallest and largest :math:`\Delta`; a step beyond is cut.
        scales: factors on z, x, B, C and dt as they leave the projection.
        impl: as in the op.

    Cost: 2 B T D (3 expand D + 2 H K + HV) FLOPs of projections, plus the convolution's and the op's.
    Cache: the state [N, HV, K, V], float32, and the convolution's tail; its size does not grow.
    Source: Dao and Gu 2024, arXiv:2405.21060; order of the projection and first values as released with it;
    options after `taps` by the released code of models that use the block.
    """

    def __init__(
        self, width: int, heads: int, *, state: int = 128, groups: int = 1, expand: int = 2, taps: int = 4,
        head_dim: int | None = None, norm: str | None = "after", norm_eps: float = 1e-5, bias: bool = False,
        conv_bias: bool = True, steps: tuple[float, float] = (0.0, math.inf),
        scales: tuple[float, float, float, float, float] | None = None, impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        if norm not in ("after", "before", None):
            raise ValueError(f"norm is {norm!r}, expected 'after', 'before' or None")
        inner, shared = heads * head_dim if head_dim else expand * width, groups * state
        if inner % heads or heads % groups:
            raise ValueError(
                f"heads is {heads}, expected a divisor of {inner} and a multiple of {groups} groups"
            )
        self.heads, self.groups, self.steps, self.impl = heads, groups, steps, impl
        self.parts = (inner, inner + 2 * shared, heads)
        self.channels = (inner, shared, shared)
        self.in_proj = nn.Linear(width, sum(self.parts), bias=bias)
        sizes = (inner, *self.channels, heads)
        factors = scales and torch.cat([torch.full((n,), x) for n, x in zip(sizes, scales, strict=True)])
        self.register_buffer("factors", factors, persistent=False)
        self.conv = ShortConvolution(inner + 2 * shared, taps, bias=conv_bias)
        # steps log-uniform between 0.001 and 0.1, decays uniform: half-lives from a token to a few hundred
        self.dt_bias = nn.Parameter(first_steps(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.normed = norm
        self.norm = HeadNorm(groups, inner // groups, eps=norm_eps) if norm else None
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        z, mixed, dt = self._project(x)
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
        z, mixed, dt = self._project(x)
        mixed, tail = self.conv.step(mixed, cache["tail"])
        q, k, v, g, skip = self._discretise(mixed, dt)
        o, state = step(q, k, v, g=g, state=cache["state"], impl=self.impl)
        return self._output(o + skip, z), {"state": state, "tail": tail}

    def _project(self, x):
        y = self.in_proj(x)
        return (y if self.factors is None else y * self.factors).split(self.parts, dim=-1)

    def _discretise(self, mixed, dt):
        x, B, C = mixed.split(self.channels, dim=-1)
        x = split_heads(x, self.heads)
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)  # [..., HV]
        dt = dt.clamp(*self.steps)
        v, skip = ((x * weight).to(x.dtype) for weight in (dt[..., None], self.D[:, None]))
        return split_heads(C, self.groups), split_heads(B, self.groups), v, -dt * self.A_log.exp(), skip

    def _output(self, y, z):
        y, gate = y.flatten(-2), F.silu(z)
        if self.normed != "before":
            y = gate * y
        if self.norm is not None:
            y = self.norm(split_heads(y, self.groups)).flatten(-2)
        return self.out_proj(gate * y if self.normed == "before" else y)
