"""Gated retention: RetNet's rotated queries and keys, a decay a head that the token chooses."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.models.config import Rope
from effattn_lite.models.rotary import turn
from effattn_lite.models.rows import LENGTH, places
from effattn_lite.ops.mamba2 import mamba2, step


class GatedRetention(Mixer):
    r"""Retention with a decay that the token chooses.

    .. math:: y = W_O\,\bigl(\mathrm{swish}(W_G x) \odot \mathrm{norm}_h(o)\bigr)

    .. math:: S_t = \sigma(w_\gamma^\top x_t)^{1/\tau}\, S_{t-1} + k_t v_t^\top, \qquad
        o_t = K^{-1/2} S_t^\top q_t

    This is Mamba-2's recurrence, whose op it calls, with rotated queries and keys.

    Args:
        width: D.
        heads: H; K = V = D / H.
        rope: how queries and keys turn.
        tau: the larger, the slower the state fades.
        norm_eps: added to the mean square of a head.
        impl: as in the op.

    Cost: 10 B T D^2 + 2 B T D H FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and how many tokens made it; its size does not grow.
    Source: Sun et al. 2024, arXiv:2405.05254, section 3.2, and the released code.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rope: Rope,
        tau: float = 16.0,
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ):
        super().__init__()
        self.heads, self.rope, self.tau, self.impl = heads, rope, tau, impl
        self.scale = (width // heads) ** -0.5
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.decay_proj = nn.Linear(width, heads, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = HeadNorm(heads, width // heads, affine=False, eps=norm_eps)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        position, length = places(x, cache, cu_seqlens)
        o, state = mamba2(
            **self._project(x, position),
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self._output(x, o), {"state": state, LENGTH: length}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        found = self._project(x[:, None], cache[LENGTH][:, None])
        found |= {name: found[name][:, 0] for name in "qkvg"}
        o, state = step(**found, state=cache["state"])
        return self._output(x, o), {"state": state, LENGTH: cache[LENGTH] + 1}

    def _project(self, x, position):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        decay = self.decay_proj(x).to(torch.promote_types(x.dtype, torch.float32))
        found = {"q": turn(q, position, self.rope), "k": turn(k, position, self.rope), "v": v}
        return found | {"g": F.logsigmoid(decay) / self.tau, "scale": self.scale, "impl": self.impl}

    def _output(self, x, o):
        return self.o_proj(F.silu(self.g_proj(x)) * self.norm(o).flatten(-2))
