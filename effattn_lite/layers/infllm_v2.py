"""InfLLM-V2 as a layer: the weights of softmax attention, read sparsely."""

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.infllm_v2 import infllm_v2


class InfLLMV2(RotaryAttention):
    """Project, rotate, let means of spans name blocks, attend to them, project.

    Its parameters are those of `SoftmaxAttention`, by name and shape: a model may load them into either, and
    use the dense one on short texts.

    Args:
        width: D.
        heads: H query heads.
        block_size, top_k, init_blocks, local_blocks, kernel_size, kernel_stride: as in the op.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of all tokens: whatever nobody chose may be chosen yet.
    Source: Zhao et al. 2025, arXiv:2509.24663.
    """

    def __init__(
        self, width: int, heads: int, *, block_size: int = 64, top_k: int = 64, init_blocks: int = 1,
        local_blocks: int = 32, kernel_size: int = 32, kernel_stride: int = 16, kv_heads: int | None = None,
        head_dim: int | None = None, rope_theta: float | None = 10_000.0, impl: str = "auto",
    ):  # fmt: skip
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.options = dict(
            block_size=block_size,
            top_k=top_k,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            impl=impl,
        )

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        return infllm_v2(q, k, v, **self.options, cu_seqlens=cu_seqlens)

    def keep(self, x):
        """All tokens."""
        return x
