"""Longformer's mixer: windows for most tokens, and second projections for those that see all."""

from collections.abc import Sequence

import torch
from torch import nn

from effattn_lite.layers.common import split_heads
from effattn_lite.ops.longformer import longformer


class Longformer(nn.Module):
    r"""Project twice, attend in windows and to global tokens, from global tokens to all, project back.

    .. math:: q, k, v = W_Q x, W_K x, W_V x, \qquad
        \bar q, \bar k, \bar v = \bar W_Q x, \bar W_K x, \bar W_V x

    It is for encoders: every token sees later ones, so there is no prefill and no step. The second
    projections begin as copies of the first. Positions are not rotated: the paper adds learned ones to the
    input, and so does who builds a model.

    Args:
        width: D.
        heads: H query heads.
        window: w, even; w / 2 tokens on each side are seen.
        dilation: r, distance between the seen tokens of a window; one number, or one for each head.
        global_tokens: positions of tokens that see all and are seen by all; `forward` takes others.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        impl: as in the op.

    Cost: 4 B T (H + 2 HKV) D K FLOPs of projections, plus the op's.
    Cache: none.
    Source: Beltagy et al. 2020, arXiv:2004.05150; code https://github.com/allenai/longformer. Differs: no
        biases, and fewer heads of keys and values if you like.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int,
        dilation: int | Sequence[int] = 1,
        global_tokens: Sequence[int] = (0,),
        kv_heads: int | None = None,
        head_dim: int | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        head_dim, self.impl = head_dim or width // heads, impl
        self.window, self.dilation, self.global_tokens = window, dilation, tuple(global_tokens)
        self.heads = {"q": heads, "k": kv_heads or heads, "v": kv_heads or heads}
        self.proj, self.global_proj = (
            nn.ModuleDict({x: nn.Linear(width, n * head_dim, bias=False) for x, n in self.heads.items()})
            for _ in range(2)
        )
        self.global_proj.load_state_dict(self.proj.state_dict())
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        global_tokens: Sequence[int] | torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result.

        global_tokens: as in the op, positions or a mask [B, T]; default the layer's own positions.
        """
        heads = {name: split_heads(self.proj[name](x), n) for name, n in self.heads.items()}
        heads |= {
            f"{name}_global": split_heads(self.global_proj[name](x), n) for name, n in self.heads.items()
        }
        o = longformer(
            **heads,
            window=self.window,
            dilation=self.dilation,
            global_tokens=self.global_tokens if global_tokens is None else global_tokens,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o.flatten(2))
