"""RWKV-4's time mixing: a shift by one token, a fading average a channel, a sigmoid gate."""

import math

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.ops.rwkv4 import rwkv4, step


class RWKV4(Mixer):
    r"""RWKV-4's time mixing: :math:`y = W_O\,\bigl(\sigma(W_R x^r) \odot o\bigr)`.

    Each of k, v and r sees its own mixture of this token and the one before,
    :math:`x'_t = x_t + \mu \odot (x_{t-1} - x_t)`; the log decay is :math:`g = -e^{\omega}`, below 0.

    Args:
        width: D.
        heads: not used, since every channel is on its own; all mixers are built alike.
        layer: index of this layer, from 0.
        layers: layers of the model; with `layer` it sets the first values of mu and omega.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: the sums a, b, m [N, D], float32, and the last token's x [N, D]; its size does not grow.
    Source: Peng et al. 2023, arXiv:2305.13048; first values of mu, omega and u from the released RWKV-v4.
    Differs: mu is the share of the token before, there it is that of this token.
    """

    def __init__(self, width: int, heads: int, *, layer: int = 0, layers: int = 1, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        self.mu = nn.Parameter(_first_shift(width, layer, layers))
        omega, u = _first_constants(width, layer, layers)
        self.omega, self.u = nn.Parameter(omega), nn.Parameter(u)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.r_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

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
        k, v, r = self._project(x, before)
        o, sums = rwkv4(
            k,
            v,
            g=-self.omega.exp(),
            u=self.u,
            initial_state=(cache["a"], cache["b"], cache["m"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(torch.sigmoid(r) * o), dict(zip("abm", sums, strict=True)) | {"x": ends}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        k, v, r = self._project(x, cache["x"])
        sums = (cache["a"], cache["b"], cache["m"])
        o, sums = step(k, v, g=-self.omega.exp(), u=self.u, state=sums, impl=self.impl)
        return self.o_proj(torch.sigmoid(r) * o), dict(zip("abm", sums, strict=True)) | {"x": x}

    def _project(self, x, before):
        mixed = [x + mu * (before - x) for mu in self.mu]
        return [proj(y) for proj, y in zip((self.k_proj, self.v_proj, self.r_proj), mixed, strict=True)]


def _depth(layer, layers):
    # 0 at the first layer, 1 at the last
    return layer / max(layers - 1, 1)


def _first_shift(width, layer, layers):
    channel = torch.arange(width) / width
    power = 1 - layer / layers
    slow, fast = channel**power, channel ** (power / 2)
    return 1 - torch.stack((slow, slow + 0.3 * _depth(layer, layers), fast))  # k, v, r


def _first_constants(width, layer, layers):
    channel = torch.arange(width)
    share = channel / max(width - 1, 1)
    omega = -5 + 8 * share ** (0.7 + 1.3 * _depth(layer, layers))
    return omega, math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
