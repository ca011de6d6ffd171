"""DeltaNet's mixer: short convolutions, unit queries and keys, a learned write strength, a norm a head."""

import torch
from torch import nn

from effattn_lite.layers.common import DeltaMixer, HeadNorm
from effattn_lite.ops.deltanet import deltanet, step


class DeltaNet(DeltaMixer):
    r"""The delta rule between projections: :math:`y = W_O\,\mathrm{RMS}_h(o)`.

    :math:`q, k = \mathrm{unit}(\mathrm{SiLU}(\mathrm{conv}(W x)))`, v without the unit length, and
    :math:`\beta = b\,\sigma(W_\beta x)`.

    Args:
        width: D.
        heads: H; K = D / H.
        expand_v: V / K.
        beta_max: b, the largest write strength; 2 lets the state reflect, so that it can count parity.
        conv_size: taps of the convolutions.
        impl: as in the op.

    Cost: 4 B T D^2 (1 + expand_v) FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32, and the convolutions' tails; its size does not grow.
    Source: Yang et al. 2024, arXiv:2406.06484, as flash-linear-attention builds it; b = 2 is of Grazzi et al.
    2024, arXiv:2411.12537.
    """

    op, step_op = staticmethod(deltanet), staticmethod(step)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_v: int = 1,
        beta_max: float = 1.0,
        conv_size: int = 4,
        impl: str = "auto",
    ):
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        K, V = width // heads, expand_v * width // heads
        super().__init__(
            width, heads, key_dim=K, value_heads=heads, value_dim=V, conv_size=conv_size, impl=impl
        )
        self.beta_max = beta_max
        self.beta_proj = nn.Linear(width, heads, bias=False)
        # one weight a channel, shared by the heads
        self.norm = HeadNorm(1, V)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Write strengths, [..., H]."""
        return {"beta": self.beta_max * self.beta_proj(x).sigmoid()}

    def output(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """Norm a head and projection, [..., H, V] -> [..., D]."""
        return self.o_proj(self.norm(o).flatten(-2))
