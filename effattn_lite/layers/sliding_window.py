"""Sliding-window attention as a layer: grouped heads, rotary positions, a rolling cache."""

import torch

from effattn_lite.layers.common import Cache, GroupedAttention, rotate
from effattn_lite.ops.engines.softmax_attention import keep
from effattn_lite.ops.sliding_window import sliding_window


class SlidingWindow(GroupedAttention):
    r"""Project, rotate, attend to the last W tokens, project: the mixer of Mistral 7B.

    One layer looks W - 1 tokens back; n of them on top of each other look n (W - 1) back.

    Args:
        width: D.
        heads: H query heads.
        window: W last tokens that are seen, the own included.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of the last W - 1 tokens; the next one completes the window. And how many
        tokens came before.
    Source: Jiang et al. 2023, arXiv:2310.06825, section 2. Differs: there token t is written into slot
        t mod W; here the cache stays in order, and a token that leaves is cut off its front.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.window, self.rope_theta, self.impl = window, rope_theta, impl

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        q, k, v = self.project(x)
        position = torch.arange(x.shape[1], device=x.device)
        seen = torch.as_tensor(x.shape[1], device=x.device)
        if cache:
            position, seen = position + cache["length"], seen + cache["length"]
        # only differences of positions count, so packed sequences need not begin at 0
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        o = sliding_window(q, k, v, window=self.window, cu_seqlens=cu_seqlens, impl=self.impl)
        y = self.o_proj(o.flatten(2))
        if cu_seqlens is not None:
            return y, {}
        return y, {"k": keep(k, self.window, 0), "v": keep(v, self.window, 0), "length": seen}
