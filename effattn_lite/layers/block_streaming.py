"""Block streaming as a layer: attention to the first blocks and the last ones."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, rotate, split_heads
from effattn_lite.ops.block_streaming import block_streaming
from effattn_lite.ops.engines.softmax_attention import keep


class BlockStreaming(Mixer):
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
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or width // heads
        self.sink_blocks, self.local_blocks, self.block_size = sink_blocks, local_blocks, block_size
        self.rope_theta, self.impl = rope_theta, impl
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
        o = block_streaming(
            q,
            k,
            v,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
            block_size=self.block_size,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        y = self.o_proj(o.flatten(2))
        if cu_seqlens is not None:
            return y, {}
        seen = torch.as_tensor(x.shape[1], device=x.device)
        return y, {
            "k": self._keep(k),
            "v": self._keep(v),
            "length": seen + cache["length"] if cache else seen,
        }

    def _keep(self, x):
        BS = self.block_size
        return keep(x, self.local_blocks * BS, self.sink_blocks * BS, BS)

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]: one query on the cache."""
        y, cache = self.prefill(x[:, None], cache)
        return y[:, 0], cache
