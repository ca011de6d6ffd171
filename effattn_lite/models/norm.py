"""The norms of a configuration as modules."""

import torch
from torch import nn

from effattn_lite.models.config import Norm


class Normalise(nn.Module):
    r"""Divide by the root of the mean square, after taking the mean away or not.

    .. math:: y = (\text{offset} + w) \odot
        \frac{x - \mu}{\sqrt{\operatorname{mean}((x - \mu)^2) + \epsilon}} + b, \qquad \mu = 0 \text{ for RMS}

    Args:
        norm: what it is.
        size: entries of the last axis.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
    """

    def __init__(self, norm: Norm, size: int):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.full((size,), 1.0 - norm.offset)) if norm.weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if norm.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last axis; float32 inside, dtype of x outside."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.norm.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y * (y.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        if self.weight is not None:
            y = y * (self.weight + self.norm.offset)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What it is, for print."""
        return str(self.norm)


def build_norm(norm: Norm | None, size: int) -> nn.Module:
    """The module of a norm; the identity where there is none."""
    return nn.Identity() if norm is None or norm.kind == "none" else Normalise(norm, size)
