"""RWKV's time mixings, told where in the model they stand, and its channel mixing."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.layers.rwkv4 import RWKV4
from effattn_lite.layers.rwkv5 import RWKV5
from effattn_lite.layers.rwkv6 import RWKV6
from effattn_lite.layers.rwkv7 import RWKV7


class _Placed:
    """A layer whose first values depend on its depth takes it from the model."""

    placed = True

    def __init__(self, width: int, heads: int = 1, *, place: tuple[int, int], **options):
        super().__init__(width, heads, layer=place[0], layers=place[1], **options)


class TimeMixing4(_Placed, RWKV4):
    """RWKV-4's, with `place`, the number of this layer and of all layers."""


class TimeMixing5(_Placed, RWKV5):
    """RWKV-5's, with `place`, the number of this layer and of all layers."""


class TimeMixing6(_Placed, RWKV6):
    """RWKV-6's, with `place`, the number of this layer and of all layers."""


class TimeMixing7(_Placed, RWKV7):
    """RWKV-7's, with `place`, the number of this layer and of all layers."""

    shares = True


class ChannelMixing(Mixer):
    r"""RWKV's feed-forward, which sees a mixture of this token and the one before.

    .. math:: y = \sigma(W_R x^r) \odot W_V \operatorname{ReLU}(W_K x^k)^2, \qquad
        x'_t = x_t + \mu \odot (x_{t-1} - x_t)

    Args:
        width: D.
        hidden: rows of W_K.
        gate: multiply by the sigmoid; RWKV-7 does not.
        place: number of this layer, and of all layers; it sets the first values of mu.

    Cost: 4 B T D hidden FLOPs, and 2 B T D^2 of the gate.
    Cache: the last token's x, [N, D].
    Source: Peng et al. 2023, arXiv:2305.13048, section 3.1.2; first values of mu from the released v4 and v7.
    Differs: mu is the share of the token before; in the released v4 and v5 it is that of this token.
    """

    placed = True

    def __init__(self, width: int, hidden: int, *, gate: bool = True, place: tuple[int, int] = (0, 1)):
        super().__init__()
        channel, rest = torch.arange(width) / width, 1 - place[0] / place[1]
        share = 1 - channel ** (rest if gate else rest**4)
        self.mu = nn.Parameter(share.repeat(2 if gate else 1, 1))  # k, r
        self.k_proj = nn.Linear(width, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.r_proj = nn.Linear(width, width, bias=False) if gate else None

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        last = cache["x"] if cache else torch.zeros_like(x[:, 0])
        before, ends = torch.cat((last[:, None], x[:, :-1]), dim=1), x[:, -1]
        if cu_seqlens is not None:
            # a text's first token has none before it, and an empty text has no last one
            edges = cu_seqlens.long()
            starts = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device).index_fill(0, edges, True)
            before = before.masked_fill(starts[:-1, None], 0)
            ends = x[0, edges[1:] - 1] * (edges.diff() > 0)[:, None]
        # a copy: a view would keep the whole text alive in the cache
        return self._mix(x, before), {"x": ends.clone()}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        return self._mix(x, cache["x"] if cache else torch.zeros_like(x)), {"x": x}

    def _mix(self, x, before):
        k, *r = (x + mu * (before - x) for mu in self.mu)
        y = self.v_proj(F.relu(self.k_proj(k)).square())
        return y if self.r_proj is None else self.r_proj(*r).sigmoid() * y
