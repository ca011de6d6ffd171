"""ABC's mixer: multi-head attention to slots that a linear map of the token controls."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, split_heads
from effattn_lite.ops.abc import abc, step

PARTS = ("keys", "values", "z", "count")


class ABC(Mixer):
    r"""Attention to M slots of memory: :math:`y = W_O\, o`, with the control :math:`s = W_s x` a head.

    Args:
        width: D.
        heads: H.
        slots: M.
        impl: as in the op.

    Cost: 2 B T D (4 D + H M) FLOPs of projections, plus the op's.
    Cache: the slots' keys and values, the logs of their weights and the count of tokens, float32; its size
    does not grow.
    Source: Peng et al. 2022, arXiv:2110.02488.
    """

    def __init__(self, width: int, heads: int, *, slots: int = 64, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.control_proj = nn.Linear(width, heads * slots, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, state = abc(
            **self._project(x),
            initial_state=tuple(cache[part] for part in PARTS) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o.flatten(2)), dict(zip(PARTS, state, strict=True))

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, state = step(**self._project(x), state=tuple(cache[part] for part in PARTS), impl=self.impl)
        return self.o_proj(o.flatten(1)), dict(zip(PARTS, state, strict=True))

    def _project(self, x):
        projections = dict(q=self.q_proj, k=self.k_proj, v=self.v_proj, s=self.control_proj)
        return {name: split_heads(proj(x), self.heads) for name, proj in projections.items()}
