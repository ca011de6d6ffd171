"""SeerAttention as a layer: softmax attention that was trained dense, and a gate beside it."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, GroupedAttention, rotate
from effattn_lite.ops.seer_attention import gate_loss, ground_truth, seer_attention


class SeerAttention(GroupedAttention):
    r"""Project, let the gate name blocks from what is not yet rotated, rotate, attend to them, project.

    The projections are those of softmax attention and may come from a trained model; `gate_loss` then trains
    the gate alone. It is for prompts: a block of queries is read as a whole, so there is no step.

    Args:
        width: D.
        heads: H query heads.
        block_size, top_k, threshold: as in the op; top_k = 16 if neither of the two is given.
        gate_dim: M, channels of the gate; default head_dim.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths, of the gate too; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of the prompt, for a layer that decodes.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """

    def __init__(
        self, width: int, heads: int, *, block_size: int = 64, top_k: int | None = None,
        threshold: float | None = None, gate_dim: int | None = None, kv_heads: int | None = None,
        head_dim: int | None = None, rope_theta: float | None = 10_000.0, impl: str = "auto",
    ):  # fmt: skip
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.block_size, self.rope_theta, self.impl = block_size, rope_theta, impl
        self.chosen = dict(top_k=16 if top_k is None and threshold is None else top_k, threshold=threshold)
        K, M = self.head_dim, gate_dim or self.head_dim
        sizes = {"w_q": heads} | dict.fromkeys(("w_max", "w_min", "w_avg"), self.kv_heads)
        self.gate = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(h, K, M) * K**-0.5) for n, h in sizes.items()}
        )

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """A whole prompt, x [B, T, D]; nothing may come before it. Packed prompts leave no cache."""
        if cache:
            raise NotImplementedError("SeerAttention reads whole prompts: a cache cannot come before them")
        q, k, v = self.project(x)
        near = self._rotated(q, k)
        o = seer_attention(
            *near, v, **self.gate, **self.chosen, block_size=self.block_size, rope_theta=self.rope_theta,
            q_gate=q, k_gate=k, cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        return self.o_proj(o.flatten(2)), {} if cu_seqlens is not None else {"k": near[1], "v": v}

    def gate_loss(self, x: torch.Tensor) -> torch.Tensor:
        """The gate's loss on a text x [B, T, D]; its gradient reaches the gate and nothing else."""
        with torch.no_grad():
            q, k, _ = self.project(x)
            truth = ground_truth(*self._rotated(q, k), block_size=self.block_size)
        return gate_loss(q, k, truth, **self.gate, block_size=self.block_size, rope_theta=self.rope_theta)

    def _rotated(self, q, k):
        if self.rope_theta is None:
            return q, k
        position = torch.arange(q.shape[1], device=q.device)
        return rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
