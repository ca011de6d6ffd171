"""Performer's mixer: attention as in a Transformer, its softmax estimated by random positive features."""

import torch

from effattn_lite.layers.common import Cache, GroupedAttention
from effattn_lite.ops.performer import performer, step


class Performer(GroupedAttention):
    r"""FAVOR+ of every head between a Transformer's projections: :math:`y = W_O\, o`.

    The frequencies are drawn, not learned, and kept with the weights; all heads share them.

    Args:
        width: D.
        heads: H; K = V = D / H.
        features: M; default 2 K.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: S [N, H, M, V] and z [N, H, M], float32; their size does not grow.
    Source: Choromanski et al. 2021, arXiv:2009.14794. Differs: frequencies are drawn anew where `redraw` is
    called, not every so many steps.
    """

    def __init__(self, width: int, heads: int, *, features: int | None = None, impl: str = "auto"):
        super().__init__(width, heads)
        self.impl = impl
        omega = draw_omega(features or 2 * self.head_dim, self.head_dim)
        self.register_buffer("omega", omega)

    def redraw(self, *, generator: torch.Generator | None = None) -> None:
        """Draw other frequencies, in place; a cache made with the old ones is worthless."""
        self.omega.copy_(draw_omega(*self.omega.shape, generator=generator))

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, (S, z) = performer(
            *self.project(x),
            omega=self.omega,
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
        o, (S, z) = step(*self.project(x), omega=self.omega, state=(cache["S"], cache["z"]), impl=self.impl)
        return self.o_proj(o.flatten(1)), {"S": S, "z": z}


def draw_omega(features: int, head_dim: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian frequencies, [M, K], orthogonal in blocks of K, with lengths of their own."""
    blocks = []
    for _ in range(-(-features // head_dim)):
        Q, R = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))
        # signs of R's diagonal make Q uniform over all rotations and reflections
        blocks.append((Q * R.diagonal().sign()).T)
    lengths = torch.randn(features, head_dim, generator=generator).norm(dim=-1, keepdim=True)
    return lengths * torch.cat(blocks)[:features]
