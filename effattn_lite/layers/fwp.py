"""The mixer of fast weight programmers: plain projections, DPFP features, a learned write strength."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, split_heads
from effattn_lite.ops.fwp import fwp, step


class FWP(Mixer):
    r"""The delta rule on features between projections: :math:`y = W_O\, o`.

    :math:`\beta = \sigma(W_\beta x)`; DPFP and its normalisation are the op's.

    Args:
        width: D.
        heads: H; K = V = D / H.
        nu: shifts of the feature map; the state has M = 2 K nu rows.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: the state [N, H, M, V], float32; its size does not grow.
    Source: Schlag et al. 2021, arXiv:2102.11174, and its released code.
    """

    def __init__(self, width: int, heads: int, *, nu: int = 3, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.nu, self.impl = heads, nu, impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.beta_proj = nn.Linear(width, heads, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, state = fwp(
            **self._project(x),
            nu=self.nu,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o.flatten(-2)), {"state": state}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, state = step(**self._project(x), state=cache["state"], nu=self.nu, impl=self.impl)
        return self.o_proj(o.flatten(-2)), {"state": state}

    def _project(self, x):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return {"q": q, "k": k, "v": v, "beta": self.beta_proj(x).sigmoid()}
