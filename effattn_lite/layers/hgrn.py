"""HGRN's mixer: a forget gate with a bound that rises with depth, an input gate tied to it, norm and gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.ops.hgrn import hgrn, step


class HGRN(Mixer):
    r"""Hierarchical gates: :math:`y = W_O\,\bigl(\mathrm{LN}(h) \odot \mathrm{SiLU}(W_G x)\bigr)`.

    .. math:: h_t = \lambda_t \odot h_{t-1} + (1 - \lambda_t) \odot \mathrm{SiLU}(W_C x_t), \qquad
        \lambda_t = \gamma + (1 - \gamma) \odot \sigma(W_F x_t)

    What is not kept is written: one gate does both. The bound gamma is 0 in the first layer and rises from
    layer to layer, so that low layers may forget at once and high ones may not.

    Args:
        width: D.
        heads: not used, since every channel is on its own; all mixers are built alike.
        layer: index of this layer, from 0.
        bounds: a parameter [layers, D] that all layers of a model share, from which `lower_bounds` takes
            gamma; None: gamma = 0, as in a first layer.
        impl: as in the op.

    Cost: 8 B T D^2 FLOPs of projections, plus the op's.
    Cache: the state [N, D], float32; its size does not grow.
    Source: Qin et al. 2023, arXiv:2311.04823, with gates, biases and norm of the released real-valued code
    (HgruRealV6). Differs: the paper's channels turn by a fixed angle a token as well.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        bounds: nn.Parameter | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        if bounds is not None and (bounds.ndim != 2 or bounds.shape[1] != width or layer >= len(bounds)):
            raise ValueError(
                f"bounds has shape {tuple(bounds.shape)}, expected [layers > {layer}, width = {width}]"
            )
        self.layer, self.bounds, self.impl = layer, bounds, impl
        self.c_proj = nn.Linear(width, width)
        self.f_proj = nn.Linear(width, width)
        self.g_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        inputs, g = self._gates(x)
        h, state = hgrn(
            inputs,
            g=g,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(x, h), {"state": state}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        inputs, g = self._gates(x)
        h, state = step(inputs, g=g, state=cache["state"], impl=self.impl)
        return self._output(x, h), {"state": state}

    def _gates(self, x):
        c, f = F.silu(self.c_proj(x)), self.f_proj(x)
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        # logarithms of sigma(f) and of 1 - sigma(f): no digit is lost at either end
        keep, write = F.logsigmoid(f), torch.sigmoid(-f)
        if self.bounds is not None:
            gamma = lower_bounds(self.bounds)[self.layer].to(f)
            # rounding may lift a gate of 1 by a digit
            keep = torch.logaddexp(gamma.log(), (1 - gamma).log() + keep).clamp(max=0)
            write = (1 - gamma) * write
        return (write * c).to(c.dtype), keep

    def _output(self, x, h):
        return self.o_proj(self.norm(h) * F.silu(self.g_proj(x)))


def lower_bounds(bounds: torch.Tensor) -> torch.Tensor:
    r"""Lower bounds of the forget gates of all layers: 0 in the first, rising, below 1.

    .. math:: \gamma^{(l)} = \sum_{i < l} \operatorname{softmax}_i(\Gamma)

    Args:
        bounds: Gamma, [layers, D].

    Returns:
        gamma, [layers, D].

    Cost: a softmax and a cumulative sum of layers D numbers.
    Source: Qin et al. 2023, arXiv:2311.04823.
    """
    shares = bounds.softmax(0)
    return torch.cat((torch.zeros_like(shares[:1]), shares[:-1].cumsum(0)))
