"""Titans' neural memory as a layer: short convolutions, unit keys, three gates a head, a gated norm."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, ShortConvolution, split_heads
from effattn_lite.ops.titans import PARTS, step, titans


class Titans(Mixer):
    r"""The memory of Titans by itself: :math:`y = W_O\,\bigl(\mathrm{norm}_h(o) \odot \sigma(W_G x)\bigr)`.

    Queries, keys and values pass a short convolution with a SiLU; queries and keys have length 1. Each head
    reads off the token how much memory it forgets, how much momentum it keeps, and its rate, each a sigmoid.

    Args:
        width: D.
        heads: H; K = V = D / H.
        batch_size: tokens whose gradients are taken at the same memory.
        impl: as in the op.

    Cost: 10 B T D^2 FLOPs of projections, plus the op's.
    Cache: the state (M, P, M', c), float32, and three convolutions' tails; its size does not grow.
    Source: Behrouz et al. 2025, arXiv:2501.00663. Differs: the memory is one matrix a head; the first values
    of the gates, 0.98 of the memory and half of the momentum kept, are this library's.
    """

    def __init__(self, width: int, heads: int, *, batch_size: int = 16, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.batch_size, self.impl = heads, batch_size, impl
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.convs = nn.ModuleList(ShortConvolution(width) for _ in "qkv")
        # forgetting, momentum, rate
        self.gates = nn.Linear(width, 3 * heads)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = HeadNorm(heads, width // heads)
        with torch.no_grad():
            self.gates.bias.copy_(torch.tensor([4.0, 0.0, 0.0]).repeat_interleave(heads))

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        tails = [cache[f"tail {name}"] if cache else None for name in "qkv"]
        parts = [
            conv.prefill(y, tail, cu_seqlens=cu_seqlens)
            for conv, y, tail in zip(self.convs, self.qkv_proj(x).chunk(3, dim=-1), tails, strict=True)
        ]
        o, state = titans(
            *self._heads(part for part, _ in parts),
            **self._rates(x),
            initial_state=tuple(cache[part] for part in PARTS) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self._output(x, o), self._cache(state, parts)

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        parts = [
            conv.step(y, cache[f"tail {name}"])
            for conv, y, name in zip(self.convs, self.qkv_proj(x).chunk(3, dim=-1), "qkv", strict=True)
        ]
        state = tuple(cache[part] for part in PARTS)
        o, state = step(*self._heads(part for part, _ in parts), **self._rates(x), state=state)
        return self._output(x, o), self._cache(state, parts)

    def _heads(self, parts):
        q, k, v = (split_heads(y, self.heads) for y in parts)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def _rates(self, x):
        keep, mu, eta = self.gates(x).chunk(3, dim=-1)
        rates = dict(g=F.logsigmoid(keep), mu=torch.sigmoid(mu), eta=torch.sigmoid(eta))
        return rates | dict(batch_size=self.batch_size, impl=self.impl)

    def _output(self, x, o):
        return self.o_proj(self.norm(o).flatten(-2) * torch.sigmoid(self.g_proj(x)))

    @staticmethod
    def _cache(state, parts):
        tails = {f"tail {name}": tail for name, (_, tail) in zip("qkv", parts, strict=True)}
        return dict(zip(PARTS, state, strict=True)) | tails
