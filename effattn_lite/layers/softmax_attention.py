"""Softmax attention as a layer: grouped heads, rotary positions, an optional window."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.engines.softmax_attention import keep
from effattn_lite.ops.softmax_attention import softmax_attention


class SoftmaxAttention(RotaryAttention):
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
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.window, self.sinks, self.impl = window, sinks, impl

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        return softmax_attention(
            q, k, v, window=self.window, sinks=self.sinks, cu_seqlens=cu_seqlens, impl=self.impl
        )

    def keep(self, x):
        """All tokens, or in a window those that the next token sees."""
        return x if self.window is None else keep(x, self.window, self.sinks)
