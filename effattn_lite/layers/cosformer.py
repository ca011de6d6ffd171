"""cosFormer's mixer: attention as in a Transformer, with nonnegative scores that fade as a cosine."""

import torch

from effattn_lite.layers.common import Cache, GroupedAttention
from effattn_lite.ops.cosformer import cosformer, step


class CosFormer(GroupedAttention):
    r"""cosFormer's attention of every head between a Transformer's projections: :math:`y = W_O\, o`.

    Args:
        width: D.
        heads: H; K = V = D / H.
        max_length: tokens that a text may have; so far away a weight has faded to 0.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: S [N, H, 2 K, V] and z [N, H, 2 K], float32, and how many tokens the longest text has, on the CPU;
    their size does not grow.
    Source: Qin et al. 2022, arXiv:2202.08791. Differs: projections have no bias; max_length is given, where
    the released code takes the length of the text, which a decoder does not know.
    """

    def __init__(self, width: int, heads: int, *, max_length: int, impl: str = "auto"):
        super().__init__(width, heads)
        self.max_length, self.impl = max_length, impl

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        seen = int(cache["length"]) if cache else 0
        o, (S, z) = cosformer(
            *self.project(x),
            max_length=self.max_length,
            offset=seen,
            initial_state=(cache["S"], cache["z"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        length = x.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
        return self.o_proj(o.flatten(2)), {"S": S, "z": z, "length": torch.tensor(seen + length)}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, (S, z) = step(
            *self.project(x),
            max_length=self.max_length,
            offset=int(cache["length"]),
            state=(cache["S"], cache["z"]),
            impl=self.impl,
        )
        return self.o_proj(o.flatten(1)), {"S": S, "z": z, "length": cache["length"] + 1}
