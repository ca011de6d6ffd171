"""HGRN2's mixer: a forget gate whose floor rises from layer to layer; the key is what it leaves over."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.hgrn2 import hgrn2, step


class HGRN2(Mixer):
    r"""Gated linear RNN with outer-product states: :math:`y = W_O\,\mathrm{norm}(o)`, q = SiLU(W_q x).

    The forget gate is :math:`f = \beta + (1 - \beta) \odot \sigma(W_f x)`; its floor beta is 0 in the first
    layer and rises, :math:`\beta_l = \sum_{1 < i \le l} \mathrm{softmax}(\Gamma)_i`, so that deep layers
    cannot forget fast.

    Args:
        width: D; V = D / heads.
        heads: H.
        head_k: K, entries of a gate and of a key; default D / H.
        bounds: Gamma, [layers, H K], one parameter that all layers of a model share; None: no floor.
        layer: index of this layer, from 0.
        impl: as in the op.

    Cost: 4 B T D (D + H K) FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32; its size does not grow.
    Source: Qin et al. 2024, arXiv:2404.07904; the floor is that of Qin et al. 2023, arXiv:2311.04823.
    """

    def __init__(
        self, width: int, heads: int, *, head_k: int | None = None, bounds: nn.Parameter | None = None,
        layer: int = 0, impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        keys = heads * (head_k or width // heads)
        if bounds is not None and bounds.shape[1:] != (keys,):
            raise ValueError(f"bounds has shape {tuple(bounds.shape)}, expected [layers, H K = {keys}]")
        self.heads, self.layer, self.bounds, self.impl = heads, layer, bounds, impl
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.f_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        # one norm over all heads
        self.norm = HeadNorm(1, width)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        q, v, g = self._project(x)
        o, state = hgrn2(
            q,
            v,
            g=g,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(o), {"state": state}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        q, v, g = self._project(x)
        o, state = step(q, v, g=g, state=cache["state"], impl=self.impl)
        return self._output(o), {"state": state}

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """log f of x [..., D], [..., H K], float32 or wider."""
        logit = self.f_proj(x).to(torch.promote_types(x.dtype, torch.float32))
        # the first floor is 0 for any Gamma; the logarithm of a sigmoid has its own, exact form
        if self.bounds is None or self.layer == 0:
            return F.logsigmoid(logit)
        floor = self.bounds.to(logit.dtype).softmax(0)[1 : self.layer + 1].sum(0)
        return (floor + (1 - floor) * logit.sigmoid()).log()

    def _project(self, x):
        q, v, g = F.silu(self.q_proj(x)), self.v_proj(x), self.log_decay(x)
        return tuple(split_heads(z, self.heads) for z in (q, v, g))

    def _output(self, o):
        return self.o_proj(self.norm(o.flatten(-2)[..., None, :]).squeeze(-2))
