"""S4's layer: a state space model a channel, then GELU and a gated linear unit that mix the channels."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.ops.s4 import s4, step
from effattn_lite.reference.s4 import hippo


class S4(Mixer):
    r"""S4's layer: :math:`y = \mathrm{GLU}\bigl(W\,\mathrm{GELU}(\mathrm{SSM}(x))\bigr)`; W mixes channels.

    Every channel begins as HiPPO-LegS with a step of its own, between 0.001 and 0.1: it sees the past through
    polynomials, over 10 to 1000 tokens. :math:`\Lambda = -e^{a} + i \omega`, P, B, C and the step are
    learned.

    Args:
        width: D.
        heads: as every layer takes it; it changes nothing, since every channel is a head of its own.
        states: M, complex numbers that a channel keeps.
        impl: as in the op.

    Cost: 4 B T D^2 FLOPs of the linear unit, plus the op's.
    Cache: the state [N, D, M], complex64; its size does not grow.
    Source: Gu et al. 2022, arXiv:2111.00396; step sizes, GELU and GLU as in the authors' released S4D layer.
    Differs: all M states are kept, where the authors keep one of each conjugate pair.
    """

    def __init__(self, width: int, heads: int = 1, *, states: int = 64, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        diagonal, P, B, _ = (torch.tensor(part) for part in hippo(states))
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(math.log(1e-3), math.log(0.1)))
        self.log_rate = nn.Parameter((-diagonal.real).log().float().repeat(width, 1))
        self.omega = nn.Parameter(diagonal.imag.float().repeat(width, 1))
        # complex numbers as pairs: `double()` and optimisers leave complex parameters as they are
        self.P, self.B = (nn.Parameter(_pairs(x).repeat(width, 1, 1)) for x in (P, B))
        self.C = nn.Parameter(torch.randn(width, states, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(width))
        self.out_proj = nn.Linear(width, 2 * width)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        y, state = s4(
            x,
            *self._system(),
            D=self.D,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return F.glu(self.out_proj(F.gelu(y))), {"state": state}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        y, state = step(x, *self._system(), D=self.D, state=cache["state"], impl=self.impl)
        return F.glu(self.out_proj(F.gelu(y))), {"state": state}

    def _system(self):
        A = torch.complex(-self.log_rate.exp(), self.omega)
        return self.log_dt.exp(), A, *(torch.view_as_complex(x) for x in (self.P, self.B, self.C))


def _pairs(x):
    return torch.view_as_real(x).float()
