"""RWKV-6's time mixing: a shift and a decay that the token chooses, a norm a head, a SiLU gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.rwkv6 import rwkv6, step

ROLES = 5
"""What the shift mixes for: w, k, v, r and g."""


class RWKV6(Mixer):
    r"""Finch's time mixing: :math:`y = W_O\,\bigl(\mathrm{SiLU}(W_G x^g) \odot \mathrm{LN}_h(o)\bigr)`.

    Each of w, k, v, r and g sees its own mixture of this token and the one before, and the token chooses it:

    .. math:: x' = x_t + \mu \odot (x_{t-1} - x_t), \qquad
        x^\square = x_t + \bigl(\mu_\square + \tanh(x' A_\square)\, B_\square\bigr) \odot (x_{t-1} - x_t)

    The decay is :math:`w = e^{-e^{\omega + \tanh(x^w A) B}}`, within (0, 1).

    Args:
        width: D.
        heads: H; K = V = D / H, 64 in the released models.
        layer: index of this layer, from 0.
        layers: layers of the model; with `layer` it sets the first values of mu, omega and u.
        mix_rank: columns of each A of the mixtures.
        decay_rank: columns of the decay's A.
        impl: as in the op.

    Cost: 2 B T D (5 D + 10 mix_rank + 2 decay_rank) FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and the last token's x [N, D]; its size does not grow.
    Source: Peng et al. 2024, arXiv:2404.05892; first values from the released RWKV-v6, save that every A is
    drawn within 1e-4 of 0, so that a gradient reaches its B from the start.
    """

    def __init__(
        self, width: int, heads: int, *, layer: int = 0, layers: int = 1, mix_rank: int = 32,
        decay_rank: int = 64, impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        shift, omega, u = _first_values(width, layer, layers)
        self.mu = nn.Parameter(shift)  # x', then the roles
        self.mix_a = nn.Parameter(torch.empty(width, ROLES * mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_b = nn.Parameter(torch.empty(ROLES, mix_rank, width).uniform_(-1e-2, 1e-2))
        self.omega = nn.Parameter(omega)
        self.decay_a = nn.Parameter(torch.empty(width, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_b = nn.Parameter(torch.empty(decay_rank, width).uniform_(-1e-2, 1e-2))
        self.u = nn.Parameter(u.view(heads, -1))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = HeadNorm(heads, width // heads, center=True, eps=64e-5)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        last = cache["x"] if cache else torch.zeros_like(x[:, 0])
        before = torch.cat((last[:, None], x[:, :-1]), dim=1)
        ends = x[:, -1]
        if cu_seqlens is not None:
            # a sequence's first token has none before it
            starts = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device)
            starts = starts.index_fill(0, cu_seqlens.long(), True)[:-1]
            before = before.masked_fill(starts[:, None], 0)
            ends = x[0, cu_seqlens[1:] - 1] * (cu_seqlens.diff() > 0)[:, None]
        r, k, v, g, gate = self._project(x, before)
        o, state = rwkv6(
            r,
            k,
            v,
            g=g,
            u=self.u,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(o, gate), {"state": state, "x": ends}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        r, k, v, g, gate = self._project(x, cache["x"])
        o, state = step(r, k, v, g=g, u=self.u, state=cache["state"], impl=self.impl)
        return self._output(o, gate), {"state": state, "x": x}

    def _project(self, x, before):
        back = before - x
        low = torch.tanh((x + self.mu[0] * back) @ self.mix_a).unflatten(-1, (ROLES, -1))
        share = torch.einsum("...rm,rmd->...rd", low, self.mix_b) + self.mu[1:]
        w, k, v, r, g = (x[..., None, :] + share * back[..., None, :]).unbind(-2)
        logit = torch.tanh(w @ self.decay_a) @ self.decay_b
        decay = -(self.omega + logit.to(torch.promote_types(x.dtype, torch.float32))).exp()
        r, k, v = self.r_proj(r), self.k_proj(k), self.v_proj(v)
        return *(split_heads(z, self.heads) for z in (r, k, v, decay)), F.silu(self.g_proj(g))

    def _output(self, o, gate):
        return self.o_proj(gate * self.norm(o).flatten(-2))


def _first_values(width, layer, layers):
    # 0 at the first layer, 1 at the last
    depth, channel = layer / max(layers - 1, 1), torch.arange(width)
    power = 1 - layer / layers
    slow, fast = (channel / width) ** power, (channel / width) ** (power / 2)
    shift = 1 - torch.stack((slow, slow, slow, slow + 0.3 * depth, fast, fast))  # x', w, k, v, r, g
    share = channel / max(width - 1, 1)
    omega = -6 + 5 * share ** (0.7 + 1.3 * depth)
    return shift, omega, depth * (1 - share) + 0.1 * ((channel + 1) % 3 - 1)
