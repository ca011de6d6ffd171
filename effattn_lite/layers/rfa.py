"""Random Feature Attention's mixer: directions of queries and keys, through sines and cosines."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, GroupedAttention
from effattn_lite.ops.rfa import rfa, step


class RFA(GroupedAttention):
    r"""Random feature attention of every head between a Transformer's projections: :math:`y = W_O\, o`.

    The frequencies are drawn, not learned, and kept with the weights; sigma stretches them, channel by
    channel of each head, and is learned.

    Args:
        width: D.
        heads: H; K = V = D / H.
        frequencies: M, half the features; default K.
        floor: smallest denominator; 1, the released code's, keeps every output below the sum of its weights.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: S [N, H, 2 M, V] and z [N, H, 2 M], float32; their size does not grow.
    Source: Peng et al. 2021, arXiv:2103.02143, sigma and floor as in the released code. Differs: frequencies
    are drawn anew where `redraw` is called, not at every step of training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        frequencies: int | None = None,
        floor: float = 1.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads)
        self.floor, self.impl = floor, impl
        self.register_buffer("omega", torch.randn(heads, frequencies or self.head_dim, self.head_dim))
        self.sigma = nn.Parameter(torch.ones(heads, 1, self.head_dim))

    def redraw(self, *, generator: torch.Generator | None = None) -> None:
        """Draw other frequencies, in place; a cache made with the old ones is worthless."""
        self.omega.normal_(generator=generator)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, (S, z) = rfa(
            *self.project(x),
            omega=self.sigma * self.omega,
            floor=self.floor,
            initial_state=(cache["S"], cache["z"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o.flatten(2)), {"S": S, "z": z}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, (S, z) = step(
            *self.project(x),
            omega=self.sigma * self.omega,
            floor=self.floor,
            state=(cache["S"], cache["z"]),
            impl=self.impl,
        )
        return self.o_proj(o.flatten(1)), {"S": S, "z": z}
