"""RWKV-7's time mixing: a shift, then decays, rates and a gate that the token chooses, a norm, a bonus."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.rwkv7 import rwkv7, step

ROLES = 6
"""What the shift mixes for: r, w, k, v, a and g."""


class RWKV7(Mixer):
    r"""Goose's time mixing: :math:`y = W_O\,(g \odot (\mathrm{LN}_h(o) + (\rho \odot r)^\top \tilde k\, v))`.

    Each of r, w, k, v, a and g sees its own mixture of this token and the one before,
    :math:`x^\square = x_t + \mu_\square \odot (x_{t-1} - x_t)`; r, k and v are projections of theirs, and

    .. math:: \log w = -e^{-1/2}\,\sigma\bigl(\omega + \tanh(x^w A_w) B_w\bigr), \qquad
        \eta = \sigma\bigl(\nu + x^a A_a B_a\bigr), \qquad g = \sigma(x^g A_g)\, B_g, \qquad
        \kappa = \mathrm{unit}(\xi \odot k), \qquad \tilde k = k \odot (1 + (\eta - 1) \odot \alpha)

    The op takes r as q, log w as its g, :math:`\tilde k` as k, :math:`-\kappa` as a and
    :math:`\kappa \odot \eta` as b: of what :math:`\kappa` finds each channel loses its share
    :math:`\eta`, which also scales the new key. The bonus lets a token see its own value past the norm.

    Args:
        width: D.
        heads: H; K = V = D / H, 64 in the released models.
        layer: index of this layer, from 0.
        layers: layers of the model; with `layer` it sets the first values.
        decay_rank, rate_rank, gate_rank: columns of each A; default about 2.5, 2.5 and 5 times sqrt(D).
        value_rank: columns of one more A: later layers mix the first one's v into theirs,
            :math:`v + \sigma(\pi + x^v A_v B_v) \odot (v_{\text{first}} - v)`; None for no such mixing.
        impl: as in the op.

    Cost: 4 B T D (2 D + decay_rank + rate_rank + gate_rank) FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and the last token's x [N, D]; its size does not grow.
    Source: Peng et al. 2025, arXiv:2503.14456; equations and first values as in the authors' RWKV-v7 code.
    Differs: A and W_O do not begin at 0, so that a gradient reaches all.
    """

    def __init__(
        self, width: int, heads: int, *, layer: int = 0, layers: int = 1, decay_rank: int | None = None,
        rate_rank: int | None = None, gate_rank: int | None = None, value_rank: int | None = None,
        impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        shift, omega, nu, xi = _first_values(width, heads, layer, layers)
        self.mu = nn.Parameter(shift)
        self.decay = _LowRank(width, decay_rank or _rank(2.5, width), torch.tanh, bias=omega)
        self.rate = _LowRank(width, rate_rank or _rank(2.5, width), nn.Identity(), bias=nu)
        self.gate = _LowRank(width, gate_rank or _rank(5, width), torch.sigmoid)
        self.first_values = None
        if value_rank is not None and layer > 0:
            pi = 0.73 - 0.4 * torch.arange(width) / max(width - 1, 1)
            self.first_values = _LowRank(width, value_rank, nn.Identity(), bias=pi)
        self.xi = nn.Parameter(xi)
        self.alpha = nn.Parameter(torch.full((width,), 1.02))
        self.rho = nn.Parameter(torch.full((heads, width // heads), -0.04))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        for proj, size in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(proj.weight, -size * width**-0.5, size * width**-0.5)
        self.norm = HeadNorm(heads, width // heads, center=True, eps=64e-5)

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each.

        `shared` holds what layers of one call tell each other: under "v" the first one's values.
        """
        last = cache["x"] if cache else torch.zeros_like(x[:, 0])
        before = torch.cat((last[:, None], x[:, :-1]), dim=1)
        ends = x[:, -1]
        if cu_seqlens is not None:
            # a sequence's first token has none before it
            starts = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device)
            starts = starts.index_fill(0, cu_seqlens.long(), True)[:-1]
            before = before.masked_fill(starts[:, None], 0)
            ends = x[0, cu_seqlens[1:] - 1] * (cu_seqlens.diff() > 0)[:, None]
        tensors, gate = self._project(x, before, shared)
        o, state = rwkv7(
            **tensors, initial_state=cache["state"] if cache else None, output_final_state=True,
            cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        return self._output(o, tensors, gate), {"state": state, "x": ends}

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        cache = cache or self._nothing(x)
        tensors, gate = self._project(x, cache["x"], shared)
        o, state = step(**tensors, state=cache["state"], impl=self.impl)
        return self._output(o, tensors, gate), {"state": state, "x": x}

    def _nothing(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        state = torch.zeros(len(x), *self.rho.shape, self.rho.shape[1], dtype=wide, device=x.device)
        return {"state": state, "x": torch.zeros_like(x)}

    def _project(self, x, before, shared=None):
        r, w, k, v, a, g = (x[..., None, :] + self.mu * (before - x)[..., None, :]).unbind(-2)
        r, k, v = self.r_proj(r), self.k_proj(k), self._values(v, shared)
        # a decay near 1 needs more digits than 16 bits have
        decay = -math.exp(-0.5) * self.decay(w).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        eta = self.rate(a).sigmoid()
        kappa = F.normalize(split_heads(k * self.xi, self.heads).to(decay.dtype), dim=-1)
        found = {
            "q": r, "k": k * (1 + (eta - 1) * self.alpha), "v": v, "g": decay, "b": kappa.flatten(-2) * eta
        }  # fmt: skip
        found = {name: split_heads(z, self.heads) for name, z in found.items()} | {"a": -kappa}
        # all but the decay in one dtype, whatever autocast made of them
        return {name: z if name == "g" else z.to(r.dtype) for name, z in found.items()}, self.gate(g)

    def _values(self, x, shared):
        v = self.v_proj(x)
        if self.first_values is not None:
            return v + self.first_values(x).sigmoid() * (shared["v"] - v)
        if shared is not None:
            shared["v"] = v
        return v

    def _output(self, o, tensors, gate):
        q, k, v = (tensors[name] for name in "qkv")
        bonus = (q * k * self.rho).sum(-1, keepdim=True) * v
        return self.o_proj(gate * (self.norm(o) + bonus).flatten(-2))


class _LowRank(nn.Module):
    """c + f(x A) B, with c = 0 unless given."""

    def __init__(self, width, rank, activation, *, bias=None):
        super().__init__()
        self.activation = activation
        self.a = nn.Parameter(torch.empty(width, rank).uniform_(-1e-4, 1e-4))
        self.b = nn.Parameter(
            nn.init.orthogonal_(torch.empty(rank, width), 0.1 * max(rank / width, 1) ** 0.5)
        )
        self.bias = nn.Parameter(bias) if bias is not None else None

    def forward(self, x):
        y = self.activation(x @ self.a) @ self.b
        return y if self.bias is None else y + self.bias


def _rank(multiple, width):
    return max(32, 32 * round(multiple * width**0.5 / 32))


def _first_values(width, heads, layer, layers):
    # 0 at the first layer, 1 at the last
    depth, channel = layer / max(layers - 1, 1), torch.arange(width)
    power = (1 - layer / layers) * torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])  # r, w, k, v, a, g
    shift = 1 - (channel / width) ** power[:, None]
    share = channel / max(width - 1, 1)
    # -1 to 1 across each head, flat in the middle
    within = torch.linspace(-1, 1, width // heads)
    zigzag = (within * within.abs()).repeat(heads)
    omega = -5.5 + 6 * share ** (1 + depth**0.3) + 2.5 * zigzag
    nu = -0.19 + 0.3 * zigzag + 0.4 * (share - 0.5)
    return shift, omega, nu, 0.71 - 0.1 * (share - 0.5)
