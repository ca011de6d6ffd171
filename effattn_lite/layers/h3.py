"""H3's layer: three projections, a shift and a diagonal state space model between two products."""

import math

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, split_heads
from effattn_lite.ops.h3 import h3, step


class H3(Mixer):
    r"""H3's layer: :math:`y = W_O\,\bigl(q \odot \mathrm{SSM}_{diag}(\mathrm{SSM}_{shift}(k) \odot v)\bigr)`.

    With K = D / heads channels a head, the products are matrices of a key and a value; one number by default
    in the released code.
    The modes begin as :math:`A_m = -\tfrac12 + i \pi m`, with steps between 0.001 and 0.1.

    Args:
        width: D.
        heads: H; K = V = D / H.
        states: M, keys that the shift sees and complex modes of the diagonal model.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: the last M keys [N, H, K, M], float32, and the modes [N, H, M, K, V], complex64; its size does not
    grow.
    Source: Fu et al. 2023, arXiv:2212.14052, and the released code. Differs: both models have M states there,
    of which the diagonal one keeps M / 2 complex ones.
    """

    def __init__(self, width: int, heads: int, *, states: int = 32, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.shift = nn.Parameter(torch.randn(heads, width // heads, states))
        self.log_dt = nn.Parameter(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.log_rate = nn.Parameter(torch.full((heads, states), math.log(0.5)))
        self.omega = nn.Parameter(math.pi * torch.arange(states, dtype=torch.float32).repeat(heads, 1))
        # complex numbers as pairs: `double()` and optimisers leave complex parameters as they are
        self.C = nn.Parameter(torch.randn(heads, states, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(heads))

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, (keys, modes) = h3(
            *self._project(x),
            **self._system(),
            initial_state=(cache["keys"], cache["modes"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.o_proj(o.flatten(-2)), {"keys": keys.contiguous(), "modes": modes}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        state = cache["keys"], cache["modes"]
        o, (keys, modes) = step(*self._project(x), **self._system(), state=state, impl=self.impl)
        return self.o_proj(o.flatten(-2)), {"keys": keys, "modes": modes}

    def _project(self, x):
        return (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))

    def _system(self):
        return {
            "shift": self.shift,
            "dt": self.log_dt.exp(),
            "A": torch.complex(-self.log_rate.exp(), self.omega),
            # a mode stands for itself and its conjugate
            "C": 2 * torch.view_as_complex(self.C),
            "D": self.D,
        }
