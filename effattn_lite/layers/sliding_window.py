"""Sliding-window attention as a layer: grouped heads, rotary positions, a rolling cache."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.engines.softmax_attention import keep
from effattn_lite.ops.sliding_window import sliding_window


class SlidingWindow(RotaryAttention):
    r"""Project, rotate, attend to the last W tokens, project: the mixer of Mistral 7B.

    One layer looks W - 1 tokens back; n of them on top of each other look n (W - 1) back.

    Args:
        width: D.
        heads: H query heads.
        window: W last tokens that are seen, the own included.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of the last W - 1 tokens; the next one completes the window. And how many
        tokens came before.
    Source: Jiang et al. 2023, arXiv:2310.06825, section 2. Differs: there token t is written into slot
        t mod W; here the cache stays in order, and a token that leaves is cut off its front.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.window, self.impl = window, impl

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        return sliding_window(q, k, v, window=self.window, cu_seqlens=cu_seqlens, impl=self.impl)

    def keep(self, x):
        """The last W - 1 tokens."""
        return keep(x, self.window, 0)
