"""Differential attention: the difference of two softmax maps, so that what both see everywhere cancels."""

import math

import torch
from torch import nn

from effattn_lite.models.attention import Attention
from effattn_lite.models.config import Norm
from effattn_lite.models.norm import build_norm
from effattn_lite.models.rows import Rows


class DifferentialAttention(Attention):
    r"""Attention whose heads work in pairs: the second map of a pair is taken away from the first.

    .. math:: o = (1 - \lambda_0)\operatorname{norm}\bigl((\operatorname{softmax}(q_1 k_1^\top)
        - \lambda \operatorname{softmax}(q_2 k_2^\top))\, (v_1, v_2)\bigr), \qquad
        \lambda = e^{a_1^\top b_1} - e^{a_2^\top b_2} + \lambda_0

    Heads 2 j and 2 j + 1 are a pair, of queries, keys and values alike, and :math:`\lambda_0 = 0.8 - 0.6
    e^{-0.3 l}` in layer l = 0, 1, ...: differences grow with depth.

    Args:
        width: D.
        heads: H, even.
        place: number of this layer, and of all layers.
        kv_heads: HKV heads of keys and values, even; default H.
        norm_eps: added to the mean square of a pair's output, 2 K wide.
        norm_weight: this norm has a weight.
        options: as `Attention`.

    Cost: as `Attention`, with values twice as wide.
    Cache: as `Attention`.
    Source: Ye et al. 2024, arXiv:2410.05258; order of heads as in the released code of SambaY.
    """

    placed = True
    """The constructor takes `place`."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        place: tuple[int, int],
        kv_heads: int | None = None,
        norm_eps: float = 1e-5,
        norm_weight: bool = True,
        **options,
    ):
        super().__init__(width, heads, kv_heads=kv_heads, **options)
        if heads % 2 or self.kv_heads % 2:
            raise ValueError(
                f"heads is {heads} and kv_heads is {self.kv_heads}, expected even numbers: pairs"
            )
        self.start = 0.8 - 0.6 * math.exp(-0.3 * place[0])
        # a_1, b_1, a_2, b_2
        self.mix = nn.Parameter(0.1 * torch.randn(2, 2, self.head_dim))
        self.pair_norm = build_norm(Norm("rms", eps=norm_eps, weight=norm_weight), 2 * self.head_dim)

    def _attend(self, q, rows):
        k = rows.parts["k"]
        v = rows.parts["v"].unflatten(2, (-1, 2)).flatten(3)  # [B, n, HKV / 2, 2 K]
        one, other = (
            super(DifferentialAttention, self)._attend(
                q[:, :, i::2], Rows({"k": k[:, :, i::2], "v": v}, rows.edges)
            )
            for i in (0, 1)
        )
        first, second = self.mix.prod(1).sum(-1).exp()
        share = (first - second + self.start).to(one.dtype)
        return (1 - self.start) * self.pair_norm(one - share * other)
