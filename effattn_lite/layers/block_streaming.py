"""Block streaming as a layer: attention to the first blocks and the last ones."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.block_streaming import block_streaming
from effattn_lite.ops.engines.softmax_attention import keep


class BlockStreaming(RotaryAttention):
    """Project, rotate, attend to the sink blocks and the local blocks, project.

    Args:
        width: D.
        heads: H query heads.
        sink_blocks: blocks at the start that are always seen.
        local_blocks: last blocks that are seen, the own included.
        block_size: BS, tokens in a block.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys and values of the blocks still visible, at most (sink_blocks + local_blocks) BS
        tokens, and how many tokens came before.
    Source: Guo et al. 2024, Block Sparse Attention, https://github.com/mit-han-lab/Block-Sparse-Attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        sink_blocks: int = 1,
        local_blocks: int,
        block_size: int = 128,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.sink_blocks, self.local_blocks, self.block_size = sink_blocks, local_blocks, block_size
        self.impl = impl

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        blocks = dict(
            sink_blocks=self.sink_blocks, local_blocks=self.local_blocks, block_size=self.block_size
        )
        return block_streaming(q, k, v, **blocks, cu_seqlens=cu_seqlens, impl=self.impl)

    def keep(self, x):
        """Whole blocks that the next token sees."""
        BS = self.block_size
        return keep(x, self.local_blocks * BS, self.sink_blocks * BS, BS)
