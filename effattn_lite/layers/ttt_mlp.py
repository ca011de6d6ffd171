"""The TTT-MLP layer: three views of a token, a rate of learning a head, an inner network, a norm."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, rotate, split_heads
from effattn_lite.ops.ttt_mlp import PARTS, step, ttt_mlp


class TTTMLP(Mixer):
    r"""A hidden state that is a network: :math:`y = W_O\,\mathrm{LN}(o)`, o the read-out of a two-layer MLP.

    Keys are the training view of a token, values the label, queries the test view. Queries and keys are
    rotated by the place in their mini-batch. A token's rate is :math:`\eta_0\,\sigma(\theta x_t) / K`.

    Args:
        width: D; K = D / heads must be even, since channels turn in pairs.
        heads: H.
        hidden: M / K.
        batch_size: tokens whose gradients are taken at the same inner network.
        base_rate: eta_0.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: the state, float32; its size does not grow.
    Source: Sun et al. 2024, arXiv:2407.04620; norms, rotation, the rate's 1/K and first values from the
    authors' released code, in its Transformer backbone. Differs: no learned factor for a token's place in its
    mini-batch; pairs of channels are (i, i + K/2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int = 4,
        batch_size: int = 16,
        base_rate: float = 0.1,
        impl: str = "auto",
    ):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(
                f"width is {width}, expected a multiple of 2 heads = {2 * heads}: pairs of channels turn"
            )
        K = width // heads
        self.heads, self.batch_size, self.base_rate, self.impl = heads, batch_size, base_rate, impl
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.rate = nn.Linear(width, heads)
        self.w1 = nn.Parameter(torch.empty(heads, K, hidden * K).normal_(std=0.02))
        self.b1 = nn.Parameter(torch.zeros(heads, hidden * K))
        self.w2 = nn.Parameter(torch.empty(heads, hidden * K, K).normal_(std=0.02))
        self.b2 = nn.Parameter(torch.zeros(heads, K))
        self.ln_weight = nn.Parameter(torch.ones(heads, K))
        self.ln_bias = nn.Parameter(torch.zeros(heads, K))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.rate.weight, std=0.02)
        nn.init.zeros_(self.rate.bias)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        place = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            owner = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True) - 1
            place = place - cu_seqlens[owner]
        elif cache:
            place = place + cache["c"][:, None]
        q, k, v, eta = self._project(x, place)
        o, state = ttt_mlp(
            q,
            k,
            v,
            eta=eta,
            **self._inner(),
            initial_state=tuple(cache[part] for part in PARTS) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.o_proj(self.norm(o.flatten(-2))), dict(zip(PARTS, state, strict=True))

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        q, k, v, eta = (z[:, 0] for z in self._project(x[:, None], cache["c"][:, None]))
        o, state = step(q, k, v, eta=eta, **self._inner(), state=tuple(cache[part] for part in PARTS))
        return self.o_proj(self.norm(o.flatten(-2))), dict(zip(PARTS, state, strict=True))

    def _project(self, x, place):
        place = place % self.batch_size
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        eta = self.base_rate / q.shape[-1] * torch.sigmoid(self.rate(x))
        return rotate(q, place), rotate(k, place), v, eta

    def _inner(self):
        names = ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias")
        inner = {name: getattr(self, name) for name in names}
        return inner | dict(batch_size=self.batch_size, impl=self.impl)
