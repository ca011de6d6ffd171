"""RWKV-5's time mixing: a shift by one token, a constant decay a channel, a norm a head, a SiLU gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.rwkv5 import rwkv5, step


class RWKV5(Mixer):
    r"""Eagle's time mixing: :math:`y = W_O\,\bigl(\mathrm{SiLU}(W_G x^g) \odot \mathrm{LN}_h(o)\bigr)`.

    Each of r, k, v and g sees its own mixture of this token and the one before,
    :math:`x'_t = x_t + \mu \odot (x_{t-1} - x_t)`; the decay is :math:`w = e^{-e^{\omega}}`, within (0, 1).

    Args:
        width: D.
        heads: H; K = V = D / H, 64 in the released models.
        layer: index of this layer, from 0.
        layers: layers of the model; with `layer` it sets the first values of mu, omega and u.
        impl: as in the op.

    Cost: 10 B T D^2 FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and the last token's x [N, D]; its size does not grow.
    Source: Peng et al. 2024, arXiv:2404.05892, section 4.1; first values from the released RWKV-v5. Its norm
    divides by 8 first, which is an eps 64 times as large.
    """

    def __init__(self, width: int, heads: int, *, layer: int = 0, layers: int = 1, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.mu = nn.Parameter(_first_shift(width, layer, layers))
        omega, u = _first_constants(width, layer, layers)
        self.omega = nn.Parameter(omega.view(heads, -1))
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
        r, k, v, gate = self._project(x, before)
        o, state = rwkv5(
            r,
            k,
            v,
            g=-self.omega.exp(),
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
        r, k, v, gate = self._project(x, cache["x"])
        o, state = step(r, k, v, g=-self.omega.exp(), u=self.u, state=cache["state"], impl=self.impl)
        return self._output(o, gate), {"state": state, "x": x}

    def _project(self, x, before):
        mixed = [x + mu * (before - x) for mu in self.mu]
        r, k, v, gate = (
            proj(m)
            for proj, m in zip((self.r_proj, self.k_proj, self.v_proj, self.g_proj), mixed, strict=True)
        )
        return *(split_heads(z, self.heads) for z in (r, k, v)), F.silu(gate)

    def _output(self, o, gate):
        return self.o_proj(gate * self.norm(o).flatten(-2))


def _depth(layer, layers):
    # 0 at the first layer, 1 at the last
    return layer / max(layers - 1, 1)


def _first_shift(width, layer, layers):
    channel = torch.arange(width) / width
    power = 1 - layer / layers
    slow, fast = channel**power, channel ** (power / 2)
    # the released code keeps the share of this token, the paper that of the one before
    return 1 - torch.stack((fast, slow, slow + 0.3 * _depth(layer, layers), fast))  # r, k, v, g


def _first_constants(width, layer, layers):
    depth, channel = _depth(layer, layers), torch.arange(width)
    share = channel / max(width - 1, 1)
    omega = -6 + 5 * share ** (0.7 + 1.3 * depth)
    return omega, depth * (1 - share) + 0.1 * ((channel + 1) % 3 - 1)
