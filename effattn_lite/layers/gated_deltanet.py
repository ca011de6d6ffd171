"""Gated DeltaNet's mixer: DeltaNet's convolutions and unit keys, Mamba-2's decay, a gated norm."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import DeltaMixer, HeadNorm, first_steps, split_heads
from effattn_lite.ops.gated_deltanet import gated_deltanet, step


class GatedDeltaNet(DeltaMixer):
    r"""The gated delta rule between projections, and a gated norm.

    .. math:: y = W_O\,\bigl(\mathrm{RMS}_h(o) \odot \mathrm{SiLU}(W_G x)\bigr)

    :math:`q, k = \mathrm{unit}(\mathrm{SiLU}(\mathrm{conv}(W x)))`, v without the unit length,
    :math:`\beta = b\,\sigma(W_\beta x)` and :math:`g = -e^{A}\,\mathrm{softplus}(W_a x + c)`.

    Args:
        width: D.
        heads: H query and key heads.
        head_dim: K; default 3 D / (4 H), rounded down: with V = 2 K the layer has about 6 D^2 weights.
        value_heads: HV, a multiple of H; default H.
        expand_v: V / K.
        beta_max: b, the largest write strength; 2 lets the state reflect.
        conv_size: taps of the convolutions.
        norm_eps: added to the mean square of a head.
        impl: as in the op.

    Cost: 2 B T D (2 H K + 3 HV V) FLOPs of projections, plus the op's.
    Cache: the state [N, HV, K, V], float32, and the convolutions' tails; its size does not grow.
    Source: Yang et al. 2024, arXiv:2412.06464, with sizes and first values of flash-linear-attention.
    """

    op, step_op = staticmethod(gated_deltanet), staticmethod(step)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        value_heads: int | None = None,
        expand_v: int = 2,
        beta_max: float = 1.0,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ):
        K, HV = head_dim or 3 * width // (4 * heads), value_heads or heads
        if HV % heads:
            raise ValueError(f"value_heads is {HV}, expected a multiple of heads = {heads}")
        V = expand_v * K
        super().__init__(width, heads, key_dim=K, value_heads=HV, value_dim=V, conv_size=conv_size, impl=impl)
        self.value_heads, self.beta_max = HV, beta_max
        self.beta_proj = nn.Linear(width, HV, bias=False)
        self.decay_proj = nn.Linear(width, HV, bias=False)
        self.gate_proj = nn.Linear(width, HV * V, bias=False)
        self.A_log = nn.Parameter(torch.empty(HV).uniform_(1e-4, 16).log())
        self.step_bias = nn.Parameter(first_steps(HV))
        # one weight a channel, shared by the heads
        self.norm = HeadNorm(1, V, eps=norm_eps)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Log decays and write strengths, [..., HV]."""
        # a decay near 1 needs more digits than 16 bits have
        a = self.decay_proj(x).to(self.step_bias.dtype) + self.step_bias
        return {
            "g": -self.A_log.exp() * F.softplus(a),
            "beta": self.beta_max * self.beta_proj(x).sigmoid(),
        }

    def output(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """Gated norm a head and projection, [..., HV, V] -> [..., D]."""
        gate = F.silu(split_heads(self.gate_proj(x), self.value_heads))
        return self.o_proj((self.norm(o) * gate).flatten(-2))
