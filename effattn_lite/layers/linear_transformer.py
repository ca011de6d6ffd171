"""The Linear Transformer's mixer: attention as in a Transformer, with features in place of the softmax."""

import torch

from effattn_lite.layers.common import Cache, GroupedAttention
from effattn_lite.ops.linear_transformer import FeatureMap, linear_transformer, step


class LinearTransformer(GroupedAttention):
    r"""Linear attention of every head between a Transformer's projections: :math:`y = W_O\, o`.

    Args:
        width: D.
        heads: H; K = V = D / H.
        feature_map: as in the op, phi of queries and keys.
        normalize: divide by the sum of the weights.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: S [N, H, M, V] and z [N, H, M], float32; their size does not grow.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236. Differs: projections have no bias.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        feature_map: FeatureMap = "elu1",
        normalize: bool = True,
        impl: str = "auto",
    ):
        super().__init__(width, heads)
        self.options = dict(feature_map=feature_map, normalize=normalize, impl=impl)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        state = (cache["S"], cache["z"]) if cache else None
        o, (S, z) = linear_transformer(
            *self.project(x),
            **self.options,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.o_proj(o.flatten(2)), {"S": S, "z": z}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, (S, z) = step(*self.project(x), **self.options, state=(cache["S"], cache["z"]))
        return self.o_proj(o.flatten(1)), {"S": S, "z": z}
