"""TransNormerLLM's mixer: SiLU features, lightning attention, one norm over all heads, a linear gate."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, HeadNorm, Mixer, split_heads
from effattn_lite.ops.lightning_attention import lightning_attention, step


class LightningAttention(Mixer):
    r"""Lightning attention with a gate: :math:`y = W_O\,\bigl(W_U x \odot \mathrm{SRMSNorm}(o)\bigr)`.

    Args:
        width: D.
        heads: H.
        layer: l, index of this layer, from 0.
        layers: L, layers of the model; late layers forget more slowly.
        g: log decay of each head, [H]; default -2^(-8 h / H) (1 - l / (L - 1) + 1e-5), h from 1.
        head_dim: K = V; default D / H.
        features: SiLU is applied to these of "qkv".
        gate: "linear", or "sigmoid" of that.
        norm_weight: the norm has learned weights.
        impl: as in the op.

    Cost: 10 B T D H K FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], float32; its size does not grow.
    Source: Qin et al. 2023, arXiv:2307.14995, section 3. Differs: the rotation of the first layer (LRPE) is
    left out; the decay is the released code's, ALiBi's slopes, where the paper prints -8 h / H (1 - l / L).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        g: torch.Tensor | None = None,
        head_dim: int | None = None,
        features: str = "qk",
        gate: str = "linear",
        norm_weight: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        if gate not in ("linear", "sigmoid"):
            raise ValueError(f"gate is {gate!r}, expected 'linear' or 'sigmoid'")
        inner = heads * (head_dim or width // heads)
        self.heads, self.features, self.gate, self.impl = heads, features, gate, impl
        g = slopes(heads, layer, layers) if g is None else torch.as_tensor(g).float()
        self.register_buffer("g", g, persistent=False)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.u_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.norm = HeadNorm(1, inner, affine=norm_weight, eps=1e-6)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        o, state = lightning_attention(
            *self._project(x),
            g=self.g,
            initial_state=cache["state"] if cache else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )
        return self._output(x, o), {"state": state}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        o, state = step(*self._project(x), g=self.g, state=cache["state"], impl=self.impl)
        return self._output(x, o), {"state": state}

    def _project(self, x):
        heads = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        return (
            split_heads(F.silu(y) if name in self.features else y, self.heads) for name, y in heads.items()
        )

    def _output(self, x, o):
        u = self.u_proj(x)
        return self.o_proj((u.sigmoid() if self.gate == "sigmoid" else u) * self.norm(o.flatten(-2)))


def slopes(heads: int, layer: int, layers: int) -> torch.Tensor:
    """TransNormerLLM's log decays, [H]: ALiBi's slopes, smaller in later layers, nearly 0 in the last."""
    depth = 1 - layer / max(layers - 1, 1) + 1e-5
    return -depth * torch.exp2(-8 / heads * torch.arange(1, heads + 1))
