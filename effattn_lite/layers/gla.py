"""GLA's mixer: a decay a channel from a narrow projection of the token, a norm a head, a swish gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.gla import gla, step


class GLA(Mixer):
    r"""GLA's mixer: :math:`y = W_O\,\bigl(\mathrm{swish}(W_r x + b_r) \odot \mathrm{norm}_h(o)\bigr)`.

    The decay is :math:`\alpha = \sigma(W_2 W_1 x + b)^{1/\tau}`: a root that starts every gate near 1.

    Args:
        width: D.
        heads: H.
        expand_k: K / (D / H); the keys are half as wide as the values.
        rank: rows of W_1; a full matrix would cost as much as the keys.
        temperature: tau.
        impl: as in the op.

    Cost: 2 B T D (3 D + 2 expand_k D + rank (1 + expand_k)) FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32; its size does not grow.
    Source: Yang et al. 2024, arXiv:2312.06635. Differs: the norm is RMS, as in the authors' library.
    """

    def __init__(
        self, width: int, heads: int, *, expand_k: float = 0.5, rank: int = 16, temperature: float = 16.0,
        impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        keys = int(expand_k * width)
        if width % heads or keys % heads:
            raise ValueError(
                f"width is {width} and expand_k * width {keys}, expected multiples of heads = {heads}"
            )
        self.heads, self.temperature, self.impl = heads, temperature, impl
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, keys))
        self.gate_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = HeadNorm(heads, width // heads)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        q, k, v, g = self._project(x)
        o, state = gla(
            q,
            k,
            v,
            g=g,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(x, o), {"state": state}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        q, k, v, g = self._project(x)
        o, state = step(q, k, v, g=g, state=cache["state"], impl=self.impl)
        return self._output(x, o), {"state": state}

    def _project(self, x):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        logit = self.decay_proj(x)
        g = F.logsigmoid(logit.to(torch.promote_types(x.dtype, torch.float32))) / self.temperature
        return q, k, v, split_heads(g, self.heads)

    def _output(self, x, o):
        return self.o_proj(F.silu(self.gate_proj(x)) * self.norm(o).flatten(-2))
