"""RetNet's mixer: rotated queries and keys, retention, a norm a head, a swish gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, rotate, split_heads
from effattn_lite.ops.retnet import retnet, step


class RetNet(Mixer):
    r"""Multi-scale retention: :math:`y = W_O\,\bigl(\mathrm{swish}(W_G x) \odot \mathrm{norm}_h(o)\bigr)`.

    Args:
        width: D; K = D / heads must be even, since channels turn in pairs.
        heads: H; head h keeps 1 - 2^(-5-h) of its state a token.
        expand_v: V / K.
        impl: as in the op.

    Cost: 4 B T D^2 (1 + expand_v) + 2 B T D^2 expand_v FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and how many tokens made it; its size does not grow.
    Source: Sun et al. 2023, arXiv:2307.08621, eq. (8), with the norm (RMS, no weights), angles and first
    weights of the released torchscale. Differs: pairs are (i, i + K/2), not (2i, 2i + 1): a permutation of
    the rows of W_Q and W_K. Torchscale's rescaling of scores is left out, since the norm undoes it.
    """

    def __init__(self, width: int, heads: int, *, expand_v: int = 2, impl: str = "auto"):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(
                f"width is {width}, expected a multiple of 2 heads = {2 * heads}: pairs of channels turn"
            )
        self.heads, self.impl = heads, impl
        self.head_dim, self.value_dim = width // heads, expand_v * width // heads
        # wavelengths reach from 2 pi to 10000 * 2 pi, both included
        half = self.head_dim // 2
        self.theta = 10_000.0 ** (half / max(half - 1, 1))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, heads * self.value_dim, bias=False)
        self.g_proj = nn.Linear(width, heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, width, bias=False)
        self.norm = HeadNorm(heads, self.value_dim, affine=False, eps=1e-6)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        B, T, _ = x.shape
        position = torch.arange(T, device=x.device)
        if cu_seqlens is None:
            length = cache["length"] if cache else position.new_zeros(B)
            position, length = length[:, None] + position, length + T
        else:
            owner = torch.searchsorted(cu_seqlens, position.to(cu_seqlens.dtype), right=True) - 1
            position, length = position - cu_seqlens[owner], cu_seqlens.diff()
        o, state = retnet(
            *self._project(x, position),
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(x, o), {"state": state, "length": length}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        q, k, v = (z[:, 0] for z in self._project(x[:, None], cache["length"][:, None]))
        o, state = step(q, k, v, state=cache["state"], impl=self.impl)
        return self._output(x, o), {"state": state, "length": cache["length"] + 1}

    def _project(self, x, position):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, position, self.theta), rotate(k, position, self.theta), v

    def _output(self, x, o):
        return self.o_proj(F.silu(self.g_proj(x)) * self.norm(o).flatten(-2))
