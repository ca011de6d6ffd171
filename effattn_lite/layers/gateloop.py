"""GateLoop's mixer: transitions of the text's own size and angle, a norm a head, a SiLU gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.gateloop import gateloop, step


class GateLoop(Mixer):
    r"""A memory that turns: :math:`y = W_O\,\bigl(\mathrm{LN}_h(o) \odot \mathrm{SiLU}(W_G x)\bigr)`.

    The transition is :math:`\sigma(W_\alpha x)\, e^{i\, W_\theta x}`: a sigmoid for its size, nothing for its
    angle.

    Args:
        width: D.
        heads: H; K = V = D / H.
        impl: as in the op.

    Cost: 14 B T D^2 FLOPs of projections, plus the op's.
    Cache: both parts of the state [N, H, K, V], float32; its size does not grow.
    Source: Katsch 2023, arXiv:2311.01927. Differs: the projections of size and angle have no bias, as those
    of q, k and v.
    """

    def __init__(self, width: int, heads: int, *, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.alpha_proj = nn.Linear(width, width, bias=False)
        self.theta_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = HeadNorm(heads, width // heads, center=True)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        q, k, v, g, theta = self._project(x)
        o, state = gateloop(
            q,
            k,
            v,
            g=g,
            theta=theta,
            initial_state=(cache["real"], cache["imaginary"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(x, o), dict(zip(("real", "imaginary"), state, strict=True))

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        q, k, v, g, theta = self._project(x)
        state = (cache["real"], cache["imaginary"])
        o, state = step(q, k, v, g=g, theta=theta, state=state, impl=self.impl)
        return self._output(x, o), dict(zip(("real", "imaginary"), state, strict=True))

    def _project(self, x):
        maps = (self.q_proj, self.k_proj, self.v_proj, self.alpha_proj, self.theta_proj)
        q, k, v, alpha, theta = (split_heads(proj(x), self.heads) for proj in maps)
        wide = torch.promote_types(alpha.dtype, torch.float32)
        return q, k, v, F.logsigmoid(alpha.to(wide)), theta.to(wide)

    def _output(self, x, o):
        return self.o_proj(self.norm(o).flatten(-2) * F.silu(self.g_proj(x)))
