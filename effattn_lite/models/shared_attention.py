"""Zamba2's hybrid layer: attention that many layers share speaks into the input of a Mamba-2 block."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.layers.mamba2 import Mamba2
from effattn_lite.models.attention import Attention
from effattn_lite.models.config import Norm, Rope
from effattn_lite.models.feed_forward import Gated
from effattn_lite.models.norm import build_norm


class Adapted(nn.Module):
    """A linear map and a correction of low rank: W x + U V x; W may be another layer's too.

    Args:
        base: W.
        rank: rows of V; 0 leaves the correction out.
        narrow: V, if it is not its own.
    """

    def __init__(self, base: nn.Linear, rank: int, narrow: nn.Linear | None = None):
        super().__init__()
        self.base, self.narrow, self.widen = base, None, None
        if rank:
            self.narrow = narrow or nn.Linear(base.in_features, rank, bias=False)
            self.widen = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D]."""
        y = self.base(x)
        return y if self.narrow is None else y + self.widen(self.narrow(x))


class SharedAttention(Mixer):
    r"""Attention over the stream and the embedding side by side, a feed-forward, then Mamba-2.

    .. math:: t = F(N A(N [x; e])), \qquad y = M(N (x + W t))

    A, F and their norms are a block that several layers share; its corrections of low rank, W and M are the
    layer's own. Which layers share is for `Config.same` to say.

    Args:
        width: D.
        mamba: options of the Mamba-2 block.
        heads: H query heads, of 2 D / H channels.
        kv_heads: HKV heads of keys and values; default H.
        hidden: entries between the products of the feed-forward.
        rank: of the feed-forward's corrections.
        attention_rank: of those of q, k and v; 0 for none.
        rope: rotary positions; None has none.
        activation: of the feed-forward.
        norm: of all norms; default RMS.

    Cost: 4 B T D (H + 2 HKV) K + 2 B T D H K + 6 B T D hidden + 2 B T D^2 FLOPs of projections, plus the
    corrections', attention's and Mamba-2's.
    Cache: attention's and Mamba-2's.
    Source: Glorioso et al. 2024, arXiv:2411.15242, and the class of transformers.
    """

    shares = True
    """`prefill` and `step` take `shared`."""
    norms = True
    """It norms its input itself."""

    def __init__(
        self,
        width: int,
        *,
        mamba: dict,
        heads: int,
        kv_heads: int | None = None,
        hidden: int,
        rank: int,
        attention_rank: int = 0,
        rope: Rope | None = None,
        activation: str = "gelu",
        norm: Norm | None = None,
    ):
        super().__init__()
        norm, wide = norm or Norm(), 2 * width
        self.attention_norm = build_norm(norm, wide)
        # scaled as heads of a model of width D are, half as wide
        self.attention = Attention(wide, heads, kv_heads=kv_heads, rope=rope, scale=(width / heads) ** -0.5)
        self.attention.o_proj = nn.Linear(wide, width, bias=False)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.attention, name, Adapted(getattr(self.attention, name), attention_rank))
        self.feed_forward_norm = build_norm(norm, width)
        self.feed_forward = feed = Gated(width, hidden, activation=activation)
        feed.gate_proj = Adapted(feed.gate_proj, rank)
        feed.up_proj = Adapted(feed.up_proj, rank, feed.gate_proj.narrow)
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = build_norm(norm, width)
        self.mamba = Mamba2(width, **mamba)

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; `shared` has their embedding."""
        return self._run("prefill", x, cache, shared, cu_seqlens=cu_seqlens)

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        return self._run("step", x, cache, shared)

    def _run(self, how, x, cache, shared, **more):
        cache = cache or {}
        both = self.attention_norm(torch.cat((x, shared["embedding"]), dim=-1))
        t, seen = getattr(self.attention, how)(both, cache.get("attention"), shared=shared, **more)
        t = self.linear(self.feed_forward(self.feed_forward_norm(t)))
        y, state = getattr(self.mamba, how)(self.norm(x + t), cache.get("mamba"), **more)
        return y, {"attention": seen, "mamba": state}
