"""GSA's mixer: swish queries, keys and values, a gate a slot, swish and one norm over all heads."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.gsa import gsa, step


class GSA(Mixer):
    r"""Gated slot attention's mixer: :math:`y = W_O\,\mathrm{norm}(\mathrm{swish}(o))`.

    q, k and v are swish of projections. The gate of a slot is :math:`\alpha = \sigma(W_\alpha x)^{1/\tau}`: a
    root that starts every gate near 1; what it does not keep is what a token writes, 1 - alpha.

    Args:
        width: D.
        heads: H.
        slots: M.
        temperature: tau.
        impl: as in the op.

    Cost: 2 B T D (4 D + H M) FLOPs of projections, plus the op's.
    Cache: both memories, [N, H, K, M] and [N, H, M, V], float32; its size does not grow.
    Source: Zhang et al. 2024, arXiv:2409.07146; the scores' scale of 1 and the swish before the norm are from
    the authors' library.
    """

    def __init__(
        self, width: int, heads: int, *, slots: int = 64, temperature: float = 8.0, impl: str = "auto"
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.temperature, self.impl = heads, temperature, impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, heads * slots, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        # one norm over all heads
        self.norm = HeadNorm(1, width)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, (keys, values) = gsa(
            **self._project(x),
            scale=1.0,
            initial_state=(cache["keys"], cache["values"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(o), {"keys": keys, "values": values}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        state = (cache["keys"], cache["values"])
        o, (keys, values) = step(**self._project(x), scale=1.0, state=state, impl=self.impl)
        return self._output(o), {"keys": keys, "values": values}

    def _project(self, x):
        q, k, v = (
            split_heads(F.silu(proj(x)), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        logit = split_heads(self.gate_proj(x), self.heads)
        g = F.logsigmoid(logit.to(torch.promote_types(x.dtype, torch.float32))) / self.temperature
        # 1 - e^g, to its last digit
        return dict(q=q, k=k, v=v, s=-torch.expm1(g).to(q.dtype), g=g)

    def _output(self, o):
        return self.o_proj(self.norm(F.silu(o).flatten(-2)[..., None, :]).squeeze(-2))
