"""Heads of attention and heads of a state space model on the same input, in one layer."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.layers.mamba import Mamba
from effattn_lite.models.attention import Attention
from effattn_lite.models.config import Norm
from effattn_lite.models.norm import build_norm


class ParallelHeads(Mixer):
    r"""Hymba's mixer: the mean of what attention and Mamba read, each normed, through one projection.

    .. math:: y = W_O\,\tfrac12\bigl(\beta_1 \odot \operatorname{norm}(\operatorname{attend}(x))
        + \beta_2 \odot \operatorname{norm}(\mathrm{SiLU}(z) \odot \operatorname{SSM}(x))\bigr)

    Args:
        width: D.
        attention: options of `Attention`, without its last projection; H V must be Mamba's expand D.
        mamba: options of `Mamba`, without its last projection.
        eps: added to the mean square in both norms.

    Cost: both mixers', less one projection.
    Cache: theirs, under "attention" and "mamba".
    Source: Dong et al. 2024, arXiv:2411.13676, section 2.2, eq. (3).
    """

    shares = True

    def __init__(
        self, width: int, *, attention: Mapping[str, object], mamba: Mapping[str, object], eps: float = 1e-6
    ):
        super().__init__()
        self.attention, self.mamba = Attention(width, **attention), Mamba(width, **mamba)
        inner = self.mamba.out_proj.in_features
        if self.attention.o_proj.in_features != inner:
            raise ValueError(
                f"attention reads {self.attention.o_proj.in_features} numbers, expected Mamba's {inner}"
            )
        # one projection after the mean
        self.attention.o_proj = self.mamba.out_proj = None
        self.attention_norm = build_norm(Norm("rms", eps=eps), inner)
        self.mamba_norm = build_norm(Norm("rms", eps=eps), inner)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        before = cache or {}
        o, rows = self.attention.read(x, before.get("attention"), cu_seqlens=cu_seqlens, shared=shared)
        y, z, state = self.mamba.scan(x, before.get("mamba"), cu_seqlens=cu_seqlens)
        return self._mean(o, y, z), {"attention": rows, "mamba": state}

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        before = cache or {}
        o, rows = self.attention.read(x[:, None], before.get("attention"), shared=shared)
        y, z, state = self.mamba.scan_step(x, before.get("mamba"))
        return self._mean(o[:, 0], y, z), {"attention": rows, "mamba": state}

    def _mean(self, o, y, z):
        return self.o_proj((self.attention_norm(o) + self.mamba_norm(y * F.silu(z))) / 2)
