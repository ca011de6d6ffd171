"""Landmark attention as a layer: every block_size-th token of the text is a landmark."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.landmark import landmark


class Landmark(RotaryAttention):
    """Project, rotate, weigh own tokens and landmarks, share the landmarks' weight out, project.

    The text has its landmarks in it, one at the end of each block, as a token of its own that a model learns;
    the layer knows them by their places. Train with top_k = None, then retrieve with a small one.

    Args:
        width: D.
        heads: H query heads.
        block_size, top_k: as in the op.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of all tokens: whatever nobody retrieved may be retrieved yet.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300. Differs: a retrieved block keeps its position, where
        the paper maps far ones into the positions of training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        block_size: int = 51,
        top_k: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.block_size, self.top_k, self.impl = block_size, top_k, impl

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        return landmark(
            q, k, v, block_size=self.block_size, top_k=self.top_k, cu_seqlens=cu_seqlens, impl=self.impl
        )

    def keep(self, x):
        """All tokens."""
        return x
