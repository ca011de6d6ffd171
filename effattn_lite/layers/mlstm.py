"""The xLSTM block's mixer: up-projection, short convolution, mLSTM, a norm a head, a skip, a SiLU gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, ShortConvolution, split_heads
from effattn_lite.ops.mlstm import mlstm, step


class MLSTM(Mixer):
    r"""Matrix LSTM in its block: the memory's read-out, normalised a head, plus a skip, times a gate.

    .. math:: y = W_{down}\bigl((\mathrm{LN}_h(o) + \lambda \odot c) \odot \mathrm{SiLU}(z)\bigr), \qquad
        (u, z) = W_{up}\, x, \quad c = \mathrm{conv}(u)

    Queries and keys are read off c, values off u, by block-diagonal maps that mix few channels each. Both
    gates of a head see q, k and v of all heads.

    Args:
        width: D.
        heads: H; K = V = expand D / H.
        expand: inner width over D.
        block: channels that the maps of q, k and v mix; a divisor of the inner width.
        impl: as in the op.

    Cost: 6 expand B T D^2 FLOPs of projections, 6 expand B T D (block + H) of small maps, plus the op's.
    Cache: the state (C, n, m), float32, and the convolution's tail; its size does not grow.
    Source: Beck et al. 2024, arXiv:2405.04517; sizes, first values and the gates' inputs from the released
    xlstm. It scales keys by K^(-1/2), which is s at the read-out here.
    """

    def __init__(self, width: int, heads: int, *, expand: int = 2, block: int = 4, impl: str = "auto"):
        super().__init__()
        inner = expand * width
        if inner % heads or inner % block:
            raise ValueError(
                f"expand * width is {inner}, expected a multiple of heads = {heads} and of block = {block}"
            )
        self.heads, self.impl = heads, impl
        self.up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, bias=True)
        # q, k, v: [inner / block] maps of [block, block] each
        self.qkv = nn.Parameter(torch.empty(3, inner // block, block, block))
        self.gates = nn.Linear(3 * inner, 2 * heads)
        self.norm = HeadNorm(heads, inner // heads, center=True)
        # as the released code, a norm with a weight and no bias
        self.norm.bias = None
        self.skip = nn.Parameter(torch.ones(inner))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self._first_values(width)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        u, z = self.up_proj(x).chunk(2, dim=-1)
        c, tail = self.conv.prefill(u, cache["tail"] if cache else None, cu_seqlens=cu_seqlens)
        q, k, v, i, f = self._project(u, c)
        o, state = mlstm(
            q,
            k,
            v,
            i=i,
            f=f,
            initial_state=(cache["C"], cache["n"], cache["m"]) if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(o, c, z), dict(zip("Cnm", state, strict=True)) | {"tail": tail}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        u, z = self.up_proj(x).chunk(2, dim=-1)
        c, tail = self.conv.step(u, cache["tail"])
        q, k, v, i, f = self._project(u, c)
        o, state = step(q, k, v, i=i, f=f, state=(cache["C"], cache["n"], cache["m"]), impl=self.impl)
        return self._output(o, c, z), dict(zip("Cnm", state, strict=True)) | {"tail": tail}

    def _project(self, u, c):
        q, k, v = (
            torch.einsum("...gb,gcb->...gc", y.unflatten(-1, maps.shape[:2]), maps).flatten(-2)
            for y, maps in zip((c, c, u), self.qkv, strict=True)
        )
        i, f = self.gates(torch.cat((q, k, v), dim=-1)).chunk(2, dim=-1)
        return *(split_heads(y, self.heads) for y in (q, k, v)), i, f

    def _output(self, o, c, z):
        return self.down_proj((self.norm(o).flatten(-2) + self.skip * c) * F.silu(z))

    def _first_values(self, width):
        small = (2 / (5 * width)) ** 0.5
        nn.init.normal_(self.up_proj.weight, std=small)
        nn.init.normal_(self.qkv, std=small)
        nn.init.normal_(self.down_proj.weight, std=2 / width**0.5)
        # both gates begin as constants: writes of about 1, memories of 20 to 400 tokens
        nn.init.zeros_(self.gates.weight)
        nn.init.normal_(self.gates.bias[: self.heads], std=0.1)
        with torch.no_grad():
            self.gates.bias[self.heads :] = torch.linspace(3.0, 6.0, self.heads)
