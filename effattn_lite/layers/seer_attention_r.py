"""SeerAttention-R as a layer: softmax attention that was trained dense, and a gate that decoding asks."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, GroupedAttention, rotate
from effattn_lite.ops.seer_attention_r import compress, gate_loss, ground_truth, seer_attention_r


class SeerAttentionR(GroupedAttention):
    r"""Project, let the gate name blocks from what is not yet rotated, rotate, attend to them, project.

    The projections are those of softmax attention and may come from a trained model; `gate_loss` then trains
    the gate alone. Every token is read as decoding reads it, in a prompt too.

    Args:
        width: D.
        heads: H query heads.
        block_size, budget, threshold: as in the op; budget = 4,096 if neither of the two is given.
        gate_dim: M, channels of the gate; default head_dim.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths, of the gate too; None leaves positions out.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: rotated keys, and values, of all tokens; compressed keys of whole blocks, M numbers each; and keys
        that are not rotated, of the block that is not whole.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """

    def __init__(
        self, width: int, heads: int, *, block_size: int = 64, budget: int | None = None,
        threshold: float | None = None, gate_dim: int | None = None, kv_heads: int | None = None,
        head_dim: int | None = None, rope_theta: float | None = 10_000.0, impl: str = "auto",
    ):  # fmt: skip
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.impl, self.where = impl, dict(block_size=block_size, rope_theta=rope_theta)
        self.chosen = dict(
            budget=4096 if budget is None and threshold is None else budget, threshold=threshold
        )
        K, M = self.head_dim, gate_dim or self.head_dim
        sizes = {"w_q": heads} | dict.fromkeys(("w_max", "w_min", "w_avg"), self.kv_heads)
        self.gate = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(h, K, M) * K**-0.5) for n, h in sizes.items()}
        )

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        q_gate, k_gate, v = self.project(x)
        q, k = self._rotated(q_gate, k_gate, cache["k"].shape[1] if cache else 0)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        seen = {} if cu_seqlens is not None else self._compress(cache, k_gate)
        how = dict(k_gate=k_gate, cu_seqlens=cu_seqlens) if not seen else dict(k_cmp=seen["k_cmp"])
        o = seer_attention_r(
            q, k=k, v=v, q_gate=q_gate, **self.gate, **self.chosen, **self.where, **how, impl=self.impl
        )
        return self.o_proj(o.flatten(2)), {"k": k, "v": v} | seen if seen else {}

    def gate_loss(self, x: torch.Tensor) -> torch.Tensor:
        """The gate's loss on a text x [B, T, D]; its gradient reaches the gate and nothing else."""
        with torch.no_grad():
            q, k, _ = self.project(x)
            truth = ground_truth(*self._rotated(q, k, 0), block_size=self.where["block_size"])
        return gate_loss(q, k, truth, **self.gate, **self.where)

    def _compress(self, cache, k):
        """Compressed keys of all whole blocks, and the keys of the block that is not whole yet."""
        keys = {name: w.detach() for name, w in self.gate.items() if name != "w_q"}
        rest, first = (torch.cat((cache["k_rest"], k), dim=1), cache["k_cmp"].shape[1]) if cache else (k, 0)
        rest = rest.detach()
        done = compress(rest, **keys, **self.where, first=first)
        left = rest[:, done.shape[1] * self.where["block_size"] :].clone()
        return {"k_cmp": torch.cat((cache["k_cmp"], done), dim=1) if cache else done, "k_rest": left}

    def _rotated(self, q, k, first):
        theta = self.where["rope_theta"]
        if theta is None:
            return q, k
        position = torch.arange(q.shape[1], device=q.device) + first
        return rotate(q, position, theta), rotate(k, position, theta)
