"""Kimi Delta Attention's mixer: DeltaNet's convolutions and unit keys, a decay a channel, a gated norm."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import DeltaMixer, HeadNorm, first_steps, split_heads
from effattn_lite.ops.kda import kda, step


class KDA(DeltaMixer):
    r"""KDA between projections: :math:`y = W_O\,\bigl(\mathrm{RMS}_h(o) \odot \sigma(G_2 G_1 x + c)\bigr)`.

    :math:`q, k = \mathrm{unit}(\mathrm{SiLU}(\mathrm{conv}(W x)))`, v without the unit length,
    :math:`\beta = b\,\sigma(W_\beta x)` and, in every key channel,
    :math:`g = -e^{A_h}\,\mathrm{softplus}(F_2 F_1 x + d)`; the projections of decay and gate have rank V.

    Args:
        width: D.
        heads: H.
        head_dim: K; default D / H.
        expand_v: V / K.
        beta_max: b, the largest write strength; 2 lets the state reflect.
        conv_size: taps of the convolutions.
        gate_bias: c is learned; else it is 0.
        norm_eps: added to the mean square of a head.
        impl: as in the op.

    Cost: 4 B T D H (K + V) + 4 B T D V + 2 B T V H (K + V) FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and the convolutions' tails; its size does not grow.
    Source: Kimi Team 2025, arXiv:2510.26692, with first values of flash-linear-attention.
    """

    op, step_op = staticmethod(kda), staticmethod(step)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        expand_v: int = 1,
        beta_max: float = 1.0,
        conv_size: int = 4,
        gate_bias: bool = True,
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ):
        K = head_dim or width // heads
        V = expand_v * K
        super().__init__(
            width, heads, key_dim=K, value_heads=heads, value_dim=V, conv_size=conv_size, impl=impl
        )
        self.value_heads, self.beta_max = heads, beta_max
        self.beta_proj = nn.Linear(width, heads, bias=False)
        self.decay_proj = _low_rank(width, V, heads * K, bias=False)
        self.gate_proj = _low_rank(width, V, heads * V, bias=gate_bias)
        self.A_log = nn.Parameter(torch.empty(heads, 1).uniform_(1, 16).log())
        self.step_bias = nn.Parameter(first_steps(heads * K).view(heads, K))
        # one weight a channel, shared by the heads
        self.norm = HeadNorm(1, V, eps=norm_eps)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Log decays, [..., H, K], and write strengths, [..., H]."""
        # a decay near 1 needs more digits than 16 bits have
        f = split_heads(self.decay_proj(x), self.value_heads).to(self.step_bias.dtype)
        return {
            "g": -self.A_log.exp() * F.softplus(f + self.step_bias),
            "beta": self.beta_max * self.beta_proj(x).sigmoid(),
        }

    def output(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """Gated norm a head and projection, [..., H, V] -> [..., D]."""
        gate = split_heads(self.gate_proj(x), self.value_heads).sigmoid()
        return self.o_proj((self.norm(o) * gate).flatten(-2))


def _low_rank(width, rank, out, *, bias):
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=bias))
