"""Softmax attention as a layer: grouped heads, rotary positions, an optional window."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, rotate, split_heads
from effattn_lite.ops.engines.softmax_attention import keep
from effattn_lite.ops.softmax_attention import softmax_attention


class SoftmaxAttention(Mixer):
    """Project, rotate, attend, project: the mixer of Llama-like models.

    Args:
        width: D.
        heads: H query heads.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        window: see this many tokens, the own included; None sees all.
        sinks: first tokens seen from outside the window too.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys and values of the tokens still visible, in a window at most sinks + window - 1, and
        how many tokens came before.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
        window: int | None = None,
        sinks: int = 0,
        impl: str = "auto",
    ):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or width // heads
        self.rope_theta, self.window, self.sinks, self.impl = rope_theta, window, sinks, impl
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        position = torch.arange(x.shape[1], device=x.device)
        if cache:
            position = position + cache["length"]
        if self.rope_theta is not None:
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        o = softmax_attention(
            q, k, v, window=self.window, sinks=self.sinks, cu_seqlens=cu_seqlens, impl=self.impl
        )
        y = self.o_proj(o.flatten(2))
        if cu_seqlens is not None:
            return y, {}
        if self.window is not None:
            k, v = keep(k, self.window, self.sinks), keep(v, self.window, self.sinks)
        seen = torch.as_tensor(x.shape[1], device=x.device)
        return y, {"k": k, "v": v, "length": seen + cache["length"] if cache else seen}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]: one query on the cache."""
        y, cache = self.prefill(x[:, None], cache)
        return y[:, 0], cache
