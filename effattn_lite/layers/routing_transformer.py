"""Routing Transformer's mixer: half of the heads look around, half meet in clusters that follow the data."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import rotate, split_heads
from effattn_lite.ops.routing_transformer import routing_transformer, update
from effattn_lite.ops.softmax_attention import softmax_attention


class RoutingTransformer(nn.Module):
    r"""Local and routing heads between projections: :math:`y = W_O\, [o_{local};\, o_{routing}]`.

    Routing heads have one projection for queries and keys when causal, and no positions. Their centroids are
    a buffer, [H - local_heads, M, K]: while the layer is training, every forward moves them towards its
    tokens, after it has used them. There is no prefill and no step: whether a token is in a cluster depends
    on later tokens, so its output changes with what follows it, causal or not.

    Args:
        width: D.
        heads: H; K = V = D / H.
        clusters: M.
        window: w, tokens in a cluster, and tokens that a local head sees to each side, its own included.
        local_heads: heads that see a rotated window, 1 to H - 1; default half of them. A token that no
            cluster calls has these alone.
        causal: see no later token.
        decay: lambda of the moving average.
        rope_theta: base of the local heads' rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: at most 8 B T D^2 FLOPs of projections, plus those of the op and of the windows.
    Cache: none.
    Source: Roy et al. 2020, arXiv:2003.05997. Differs: rotary instead of relative positions, a window that
        slides instead of blocks, and no commitment loss.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        clusters: int = 16,
        window: int = 64,
        local_heads: int | None = None,
        causal: bool = True,
        decay: float = 0.999,
        rope_theta: float | None = 10_000.0,
        impl: str = "auto",
    ):
        super().__init__()
        local = heads // 2 if local_heads is None else local_heads
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        if not 1 <= local < heads:
            raise ValueError(f"local_heads is {local}, expected 1 to heads - 1 = {heads - 1}")
        self.heads, self.local, self.window, self.causal = heads, local, window, causal
        self.decay, self.rope_theta, self.impl = decay, rope_theta, impl
        K = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, K * (local if causal else heads), bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        start = F.layer_norm(torch.randn(heads - local, clusters, K), (K,))
        self.register_buffer("centroids", start)

    def forward(self, x: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Mix a whole text, or packed ones; x is [B, T, D], so is the result."""
        # under autocast a rounded token could fall into another cluster
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.q_proj.weight.dtype)
            q = split_heads(self.q_proj(wide), self.heads)
            k = self.k_proj(wide).unflatten(-1, (-1, q.shape[3]))
        v = split_heads(self.v_proj(x).to(q.dtype), self.heads)
        near, far = slice(None, self.local), slice(self.local, None)
        q_far, k_far = q[:, :, far], q[:, :, far] if self.causal else k[:, :, far]
        o_near = self._look_around(q[:, :, near], k[:, :, near], v[:, :, near], cu_seqlens)
        o_far = routing_transformer(
            q_far, k_far, v[:, :, far], centroids=self.centroids, window=self.window,
            causal=self.causal, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        if self.training:
            self.centroids.copy_(update(self.centroids, q_far, k_far, decay=self.decay))
        return self.o_proj(torch.cat((o_near, o_far), dim=2).flatten(2))

    def _look_around(self, q, k, v, cu_seqlens):
        if self.rope_theta is not None:
            # only differences of positions count, so packed sequences need not begin at 0
            position = torch.arange(q.shape[1], device=q.device)
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        return softmax_attention(
            q, k, v, causal=self.causal, window=self.window, cu_seqlens=cu_seqlens, impl=self.impl
        )
