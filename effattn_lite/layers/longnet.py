"""LongNet's dilated attention as a layer."""

import math
from collections.abc import Sequence

from effattn_lite.layers.common import RotaryAttention
from effattn_lite.ops.longnet import longnet


class LongNet(RotaryAttention):
    """Project, rotate, attend inside segments at several dilations in one softmax, project.

    Args:
        width: D.
        heads: H query heads.
        segments: w_i, tokens in a segment of pattern i.
        dilations: r_i, distance between kept tokens, as many as segments.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys and values since the last token at which all segments end, less than the least common
        multiple of the w_i, and how many tokens came before.
    Source: Ding et al. 2023, arXiv:2307.02486; code https://github.com/microsoft/torchscale. Differs: rotary
        positions, where the code scales them as well (XPos), and no norm before the last projection.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        segments: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
        dilations: Sequence[int] = (1, 2, 4, 6, 12),
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.segments, self.dilations, self.impl = tuple(segments), tuple(dilations), impl
        self.period = math.lcm(*self.segments)

    def attend(self, q, k, v, cu_seqlens):
        """o of rotated queries on the cache and the new tokens."""
        patterns = dict(segments=self.segments, dilations=self.dilations)
        return longnet(q, k, v, **patterns, cu_seqlens=cu_seqlens, impl=self.impl)

    def keep(self, x):
        """What follows the last token at which all segments end: no later token sees beyond it."""
        # a copy: a view would keep all of x alive
        return x[:, x.shape[1] // self.period * self.period :].clone()
