"""The Attention Free Transformer's mixer: q, k and v, an average a channel, positions if they are learned."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.ops.aft import aft, step


class AFT(Mixer):
    r"""Attention without scores: :math:`y = W_O\, o`, with o the op's average of values, gated by q.

    Args:
        width: D.
        heads: not used, since every channel is on its own; all mixers are built alike.
        max_length: longest text, in tokens, for a learned bias a pair of positions (AFT-full); None: none is
            learned (AFT-simple), and any text will do.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: the sums a, b, m [N, D], float32, whose size does not grow; of AFT-full the keys and values so far.
    Source: Zhai et al. 2021, arXiv:2105.14103. Differs: w is a free matrix, not a product of two narrow ones.
    """

    def __init__(self, width: int, heads: int, *, max_length: int | None = None, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.w = None
        if max_length is not None:
            self.w = nn.Parameter(nn.init.xavier_uniform_(torch.empty(max_length, max_length)))

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each, AFT-full none."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.w is not None:
            return self._full(q, k, v, cache, cu_seqlens)
        o, sums = aft(
            q,
            k,
            v,
            initial_state=(cache["a"], cache["b"], cache["m"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o), dict(zip("abm", sums, strict=True))

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache or self.w is not None:
            y, cache = self.prefill(x[:, None], cache)
            return y[:, 0], cache
        sums = (cache["a"], cache["b"], cache["m"])
        o, sums = step(self.q_proj(x), self.k_proj(x), self.v_proj(x), state=sums, impl=self.impl)
        return self.o_proj(o), dict(zip("abm", sums, strict=True))

    def _full(self, q, k, v, cache, cu_seqlens):
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        o, _ = aft(q, k, v, w=self.w, cu_seqlens=cu_seqlens, impl=self.impl)
        return self.o_proj(o), {"k": k, "v": v} if cu_seqlens is None else {}
