"""StreamingLLM as a layer: sinks and a window, with positions counted inside the cache."""

import torch

from effattn_lite.layers.common import Cache, GroupedAttention, rotate
from effattn_lite.ops.engines.softmax_attention import keep
from effattn_lite.ops.streaming_llm import streaming_llm


class StreamingLLM(GroupedAttention):
    r"""Attention to the first few tokens and the last W, at positions that never pass sinks + W.

    A key's position is its place in the cache: the distance to a key in the window is the true one, the
    distance to a sink stops growing.

    .. math:: \text{position of query } t = \begin{cases} t & \text{towards the window} \\
        \min(t,\ n_{\mathrm{sink}} + W - 1) & \text{towards the sinks} \end{cases}

    Args:
        width: D.
        heads: H query heads.
        sinks: tokens at the start that are always seen.
        window: W last tokens that are seen, the own included.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's; a prefill longer than the cache doubles the
        op's K, since a query has two positions.
    Cache: unrotated keys, and values, of the sinks and the last W - 1 tokens; the next one completes it.
    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        sinks: int = 4,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.rope_theta, self.window, self.sinks, self.impl = rope_theta, window, sinks, impl

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        q, k, v = self.project(x)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        # places in the cache: once tokens have left it, window and queries are shifted alike
        place = torch.arange(k.shape[1], device=x.device)
        if cu_seqlens is not None:
            edges = cu_seqlens.to(place.dtype)
            place = place - edges[torch.searchsorted(edges, place, right=True) - 1]
        q, rotated = self._two_positions(q, k, place)
        o = streaming_llm(
            q,
            rotated,
            v,
            sinks=self.sinks,
            window=self.window,
            scale=self.head_dim**-0.5,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        y = self.o_proj(o.flatten(2))
        if cu_seqlens is not None:
            return y, {}
        return y, {"k": keep(k, self.window, self.sinks), "v": keep(v, self.window, self.sinks)}

    def _two_positions(self, q, k, place):
        """Rotated queries and keys; products know the true distance, or, to a sink, that in the cache."""
        theta, last = self.rope_theta, self.sinks + self.window - 1
        ours = place[k.shape[1] - q.shape[1] :]
        near, rotated = rotate(q, ours, theta), rotate(k, place, theta)
        if k.shape[1] <= last + 1:
            return near, rotated
        # twice as many channels: a sink answers to the second half of the query, another key to the first
        sink = (place < self.sinks)[:, None, None]
        far = rotate(q, ours.clamp(max=last), theta)
        return torch.cat((near, far), dim=-1), torch.cat((rotated * ~sink, rotated * sink), dim=-1)
