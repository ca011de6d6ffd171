"""Griffin's recurrent block: a short convolution, then a leaky sum a channel whose leak the token sets."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer, ShortConvolution, split_heads
from effattn_lite.models.feed_forward import ACTIVATIONS
from effattn_lite.models.rows import places
from effattn_lite.ops.hgrn import hgrn, step

SHARPNESS = 8.0


class BlockDiagonal(nn.Module):
    """A linear map of each head by itself, [..., H K] -> [..., H K], with a bias.

    Args:
        heads: H.
        head_dim: K.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        bound = head_dim**-0.5
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., H K]."""
        y = torch.einsum("...hi,hij->...hj", split_heads(x, len(self.weight)), self.weight)
        return (y + self.bias).flatten(-2)


class RGLRU(Mixer):
    r"""Griffin's recurrent block: :math:`y = W_O\,\bigl(\operatorname{act}(W_Y x) \odot h\bigr)`.

    With :math:`u = \operatorname{conv}(W_X x)`, and gates from block-diagonal maps,

    .. math:: h_t = a_t \odot h_{t-1} + \sqrt{1 - a_t^2} \odot \sigma(W_I u_t + b_I) \odot u_t, \qquad
        a_t = \exp\bigl(-8 \operatorname{softplus}(\Lambda) \odot \sigma(W_R u_t + b_R)\bigr)

    The root keeps the size of h whatever the leak; a text's first token, which nothing precedes, is added
    whole.

    Args:
        width: D.
        inner: channels of both branches, a multiple of the heads.
        heads: blocks of the gates' maps.
        taps: tokens that the convolution sees.
        activation: of the other branch, a key of `feed_forward.ACTIVATIONS`.
        impl: as in the op.

    Cost: 6 B T D inner + 4 B T inner^2 / heads FLOPs of projections, plus the convolution's and the op's.
    Cache: the state [N, inner], at least float32, and the convolution's tail; its size does not grow.
    Source: De et al. 2024, arXiv:2402.19427; first values and the whole first token as in the class of
    transformers.
    """

    def __init__(
        self,
        width: int,
        *,
        inner: int,
        heads: int,
        taps: int = 4,
        activation: str = "gelu_tanh",
        impl: str = "auto",
    ):
        super().__init__()
        if inner % heads:
            raise ValueError(f"inner is {inner}, expected a multiple of heads = {heads}")
        self.activation, self.impl = ACTIVATIONS[activation], impl
        self.x_proj = nn.Linear(width, inner)
        self.y_proj = nn.Linear(width, inner)
        self.conv = ShortConvolution(inner, taps, bias=True, activate=False)
        self.input_gate = BlockDiagonal(heads, inner // heads)
        self.leak_gate = BlockDiagonal(heads, inner // heads)
        # softplus(rate) is -ln a, with a between 0.9 and 0.999
        a = torch.empty(inner).uniform_(0.9**2, 0.999**2).sqrt()
        self.rate = nn.Parameter((1 / a - 1).log())
        self.o_proj = nn.Linear(inner, width)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        u, tail = self.conv.prefill(self.x_proj(x), cache["tail"] if cache else None, cu_seqlens=cu_seqlens)
        first = None if cache else places(x, None, cu_seqlens)[0] == 0
        u, g = self._leak(u, first)
        h, state = hgrn(
            u, g=g, initial_state=cache["state"] if cache else None, output_final_state=True,
            cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        return self._output(x, h), {"state": state, "tail": tail}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        u, tail = self.conv.step(self.x_proj(x), cache["tail"])
        u, g = self._leak(u)
        h, state = step(u, g=g, state=cache["state"], impl=self.impl)
        return self._output(x, h), {"state": state, "tail": tail}

    def _leak(self, u, first=None):
        wide = torch.promote_types(u.dtype, torch.float32)
        g = -SHARPNESS * F.softplus(self.rate.to(wide)) * self.leak_gate(u).to(wide).sigmoid()
        # away from 0, where the root's slope has no bound
        root = (-torch.expm1(2 * g)).clamp(min=1e-12).sqrt()
        if first is not None:
            root = root.masked_fill(first[..., None], 1)
        return (root * self.input_gate(u).sigmoid() * u).to(u.dtype), g

    def _output(self, x, h):
        return self.o_proj(self.activation(self.y_proj(x)) * h)
