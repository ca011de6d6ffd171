"""The Sparse Transformer's attention as a layer: heads that look around and heads that look far back."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.sparse_transformer import sparse_transformer


class SparseTransformer(RotaryAttention):
    """Project, rotate, attend to A(t) in even heads and to B(t) in odd ones, project.

    Two layers reach every earlier token: what B brings from afar, A of the other layer spreads, or the other
    way round.

    Args:
        width: D.
        heads: H query heads.
        pattern: "strided" or "fixed".
        stride: l, tokens in a period or a block.
        summary: c, last tokens of each block that all later ones see; only in "fixed".
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys and values of all tokens, since heads B come back to any of them, and how many tokens
        came before; a step reads only the sets of its token.
    Source: Child et al. 2019, arXiv:1904.10509. Differs: rotary positions.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        pattern: str = "strided",
        stride: int,
        summary: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.pattern, self.stride, self.summary, self.impl = pattern, stride, summary, impl

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        sizes = dict(pattern=self.pattern, stride=self.stride, summary=self.summary)
        return sparse_transformer(q, k, v, **sizes, cu_seqlens=cu_seqlens, impl=self.impl)

    def keep(self, x):
        """All of it."""
        return x
