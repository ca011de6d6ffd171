"""xLSTM's mixer with memory mixing: a short convolution for two of the gates, sLSTM, a norm a head."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, ShortConvolution, split_heads
from effattn_lite.ops.slstm import slstm, step

GATES = ("z", "i", "f", "o")


class SLSTM(Mixer):
    r"""Scalar LSTM with exponential gates: :math:`y = \mathrm{LN}_h(h)`.

    Input and forget gate see the short convolution of the text, cell input and output gate the token itself;
    all four see the head's last output through its recurrent weights, by which the cells of a head mix.

    Args:
        width: D.
        heads: H; V = D / H; no map in the layer leaves its head.
        layer: index of this layer, from 0.
        layers: layers of the model; with `layer` it sets the first biases of the forget gates.
        impl: as in the op.

    Cost: 8 B T D^2 / H FLOPs of projections, 8 B T D of the convolution, plus the op's.
    Cache: the state (c, n, h, m), each [N, H, V], float32, and the convolution's tail; it does not grow.
    Source: Beck et al. 2024, arXiv:2405.04517, with the wiring and first values of the released xlstm, whose
    recurrent weights begin at 0. The feed-forward part that follows there belongs to the block.
    """

    def __init__(self, width: int, heads: int, *, layer: int = 0, layers: int = 1, impl: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads, self.impl = heads, impl
        head_dim = width // heads
        self.conv = ShortConvolution(width, bias=True)
        # one block-diagonal map a gate, [H, V, V] each, as the recurrent ones
        self.w = nn.Parameter((2 / (5 * width)) ** 0.5 * torch.randn(4, heads, head_dim, head_dim))
        self.r = nn.Parameter(torch.zeros(4, heads, head_dim, head_dim))
        self.b = nn.Parameter(torch.zeros(4, heads, head_dim))
        share = torch.arange(head_dim) / max(head_dim - 1, 1)
        with torch.no_grad():
            self.b[GATES.index("f")] = 5 - 12 * share ** (0.3 + 1.3 * layer / max(layers - 1, 1))
        self.norm = HeadNorm(heads, head_dim, center=True)
        # as the released code, a norm with a weight and no bias
        self.norm.bias = None

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        c, tail = self.conv.prefill(x, cache["tail"] if cache else None, cu_seqlens=cu_seqlens)
        h, state = slstm(
            **self._project(x, c),
            initial_state=tuple(cache[part] for part in "cnhm") if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self.norm(h).flatten(-2), dict(zip("cnhm", state, strict=True)) | {"tail": tail}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        c, tail = self.conv.step(x, cache["tail"])
        state = tuple(cache[part] for part in "cnhm")
        h, state = step(**self._project(x, c), state=state, impl=self.impl)
        return self.norm(h).flatten(-2), dict(zip("cnhm", state, strict=True)) | {"tail": tail}

    def _project(self, x, c):
        sources = {"z": x, "i": c, "f": c, "o": x}
        gates = {
            name: torch.einsum("...hv,hvw->...hw", split_heads(sources[name], self.heads), w) + b
            for name, w, b in zip(GATES, self.w, self.b, strict=True)
        }
        return gates | {f"r_{name}": r for name, r in zip(GATES, self.r, strict=True)}
