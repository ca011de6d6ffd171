"""LogSparse attention as a layer: convolved queries and keys, which match shapes, not points."""

import torch
from torch import nn
from torch.nn.functional import pad

from effattn_lite.layers.common import Cache, GroupedAttention, split_heads
from effattn_lite.ops.logsparse import logsparse


class LogSparse(GroupedAttention):
    r"""Convolve for queries and keys, project for values, attend at distances 0, 1, 2, 4, ..., project.

    .. math:: q_t = \sum_{i=0}^{n-1} W^q_i x_{t-i}, \qquad k_t = \sum_{i=0}^{n-1} W^k_i x_{t-i}, \qquad
        v_t = W^v x_t

    Positions are not rotated: the paper adds learned ones to the input, and so does who builds a model.

    Args:
        width: D.
        heads: H query heads.
        local: c last tokens that are all seen, the own included.
        restart: L_sub, tokens after which the pattern starts again; None: never.
        kernel_size: n tokens under the convolutions, the own included; 1 gives projections.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        impl: as in the op.

    Cost: 2 B T D K (n (H + HKV) + HKV + H) FLOPs of convolutions and projections, plus the op's.
    Cache: keys and values of all tokens, since each lies at a seen distance from some later one; and the
        tail, the last n - 1 inputs.
    Source: Li et al. 2019, arXiv:1907.00235.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        local: int = 1,
        restart: int | None = None,
        kernel_size: int = 3,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        impl: str = "auto",
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.local, self.restart, self.kernel_size, self.impl = local, restart, kernel_size, impl
        # the inputs under a convolution stand side by side, the oldest first
        self.q_proj = nn.Linear(kernel_size * width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(kernel_size * width, self.kv_heads * self.head_dim, bias=False)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        before, T = self.kernel_size - 1, x.shape[1]
        window = torch.cat((cache["tail"], x), dim=1) if cache else pad(x, (0, 0, before, 0))
        taps = [window[:, i : i + T] for i in range(self.kernel_size)]
        if cu_seqlens is not None:
            token = torch.arange(T, device=x.device)
            owner = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
            seen = token - cu_seqlens[owner]
            taps = [tap.masked_fill((seen < before - i)[:, None], 0) for i, tap in enumerate(taps)]
        near = torch.cat(taps, dim=-1)  # [B, T, n D]
        q, k = split_heads(self.q_proj(near), self.heads), split_heads(self.k_proj(near), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        sets = dict(local=self.local, restart=self.restart)
        y = self.o_proj(logsparse(q, k, v, **sets, cu_seqlens=cu_seqlens, impl=self.impl).flatten(2))
        if cu_seqlens is not None:
            return y, {}
        # a copy: a view would keep the whole window alive
        return y, {"k": k, "v": v, "tail": window[:, T:].clone()}
