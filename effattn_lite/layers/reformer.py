"""Reformer's mixer: attention by locality-sensitive hashing, with one projection for queries and keys."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import split_heads
from effattn_lite.ops.reformer import reformer


class Reformer(nn.Module):
    r"""LSH attention between two projections: :math:`y = W_O\, \mathrm{LSH}(W_{QK}\, x, W_V\, x)`.

    There is no prefill and no step: how a round cuts its sorted tokens into chunks depends on all of them, so
    a token's output changes with what follows it, causal or not.

    Args:
        width: D.
        heads: H; K = V = D / H.
        rounds: R, hashes of a token.
        buckets: of a round, even; the paper has 2 T / chunk_size.
        chunk_size: C, tokens in a chunk.
        causal: see no later token.
        seed: of the random directions, kept with the weights as `omega`; give each layer its own.
        impl: as in the op.

    Cost: 6 B T D^2 FLOPs of projections, plus the op's.
    Cache: none.
    Source: Kitaev et al. 2020, arXiv:2001.04451. Differs: the directions are drawn once, not at every call,
        and the reversible residuals are the block's.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rounds: int = 4,
        buckets: int = 32,
        chunk_size: int = 64,
        causal: bool = True,
        seed: int = 0,
        impl: str = "auto",
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        if buckets < 2 or buckets % 2:
            raise ValueError(f"buckets is {buckets}, expected an even number >= 2")
        self.heads, self.rounds, self.chunk_size = heads, rounds, chunk_size
        self.causal, self.impl = causal, impl
        self.qk_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        shape = heads, rounds * buckets // 2, width // heads
        self.register_buffer("omega", torch.randn(*shape, generator=generator))

    def forward(self, x: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result."""
        # under autocast a rounded direction could fall into another bucket
        with torch.autocast(x.device.type, enabled=False):
            q = F.linear(x.to(self.qk_proj.weight.dtype), self.qk_proj.weight)
        v = self.v_proj(x).to(q.dtype)
        o = reformer(
            split_heads(q, self.heads), split_heads(v, self.heads), omega=self.omega, rounds=self.rounds,
            chunk_size=self.chunk_size, causal=self.causal, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        return self.o_proj(o.flatten(2))
