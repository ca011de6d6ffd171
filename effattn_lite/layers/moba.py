"""MoBA as a layer: attention to the blocks that each query picks."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.moba import moba


class MoBA(RotaryAttention):
    """Project, rotate, pick blocks and attend to them, project: no parameter more than softmax attention.

    Blocks are picked by rotated queries and keys, those that the attention itself multiplies.

    Args:
        width: D.
        heads: H query heads.
        block_size: BS, tokens in a block.
        top_k: blocks of a query, its own among them.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of all tokens: whatever nobody chose may be chosen yet.
    Source: Lu et al. 2025, arXiv:2502.13189.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        block_size: int = 512,
        top_k: int = 3,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.block_size, self.top_k, self.impl = block_size, top_k, impl

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        return moba(
            q, k, v, block_size=self.block_size, top_k=self.top_k, cu_seqlens=cu_seqlens, impl=self.impl
        )

    def keep(self, x):
        """All tokens."""
        return x
