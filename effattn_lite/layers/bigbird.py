"""BigBird's mixer: block-sparse attention on neighbours, global blocks and random ones."""

import torch
from torch import nn

from effattn_lite.layers.common import split_heads
from effattn_lite.ops.bigbird import bigbird


class BigBird(nn.Module):
    """Project, attend to neighbouring, first, last and random blocks, project back.

    It is for encoders: every token sees later ones, so there is no prefill and no step. Positions are not
    rotated: the paper adds learned ones to the input, and so does who builds a model.

    Args:
        width: D.
        heads: H query heads; each draws its own random blocks.
        block_size: tokens in a block.
        random_blocks: r blocks that a block draws beyond those it sees anyway.
        seed: of the draw, the same in training and after; layers of a model take different ones.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: none.
    Source: Zaheer et al. 2020, arXiv:2007.14062; code https://github.com/google-research/bigbird. Differs: no
        biases, and fewer heads of keys and values if you like.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        block_size: int = 64,
        random_blocks: int = 3,
        seed: int = 0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
        self.heads, self.kv_heads, self.impl = heads, kv_heads, impl
        self.block_size, self.random_blocks, self.seed = block_size, random_blocks, seed
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result."""
        q = split_heads(self.q_proj(x), self.heads)
        k, v = (split_heads(proj(x), self.kv_heads) for proj in (self.k_proj, self.v_proj))
        sets = dict(block_size=self.block_size, random_blocks=self.random_blocks, seed=self.seed)
        return self.o_proj(bigbird(q, k, v, **sets, cu_seqlens=cu_seqlens, impl=self.impl).flatten(2))
