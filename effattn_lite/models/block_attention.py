"""Attention that reads the blocks of tokens that its own keys point at, in training and after."""

import torch

from effattn_lite.models.attention import Attention
from effattn_lite.ops.infllm_v2 import infllm_v2


class BlockAttention(Attention):
    """InfLLM-V2 in a model: the weights of `Attention`, of which it reads a few blocks a query.

    Args:
        width: D.
        heads: H.
        block_size, top_k, init_blocks, local_blocks, kernel_size, kernel_stride: as in `ops.infllm_v2`.
        options: as `Attention`, without a window, a chunk, a softcap and sinks.

    Cost: as `Attention`'s projections, plus the op's.
    Cache: as `Attention`: whatever nobody chose may be chosen yet.
    Source: Zhao et al. 2025, arXiv:2509.24663.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        block_size: int = 64,
        top_k: int = 64,
        init_blocks: int = 1,
        local_blocks: int = 32,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        **options,
    ):
        super().__init__(width, heads, **options)
        if self.window is not None or self.pattern["softcap"] or self.sinks is not None:
            raise ValueError("got a window, a chunk, a softcap or sinks, expected none: blocks are chosen")
        self.blocks = dict(
            block_size=block_size,
            top_k=top_k,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            scale=self.pattern["scale"],
            impl=self.pattern["impl"],
        )

    def _attend(self, q, rows):
        packed = rows.edges is not None and len(q) == 1 and q.shape[1] == rows.parts["k"].shape[1]
        if rows.edges is None or packed:
            return infllm_v2(q, **rows.parts, cu_seqlens=rows.edges, **self.blocks)
        return torch.cat([infllm_v2(q[i : i + 1], **row, **self.blocks) for i, row in enumerate(rows)])
