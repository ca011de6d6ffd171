"""Learned vectors in front of every text, which later tokens can always look at."""

import torch
from torch import nn


class MetaTokens(nn.Module):
    """Vectors that stand before the first token of each text, the same for all.

    Args:
        number: of them, n.
        width: D.

    Source: Dong et al. 2024, arXiv:2411.13676, section 2.3.
    """

    def __init__(self, number: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(number, width))

    def __len__(self) -> int:
        """n."""
        return len(self.weight)

    def put(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put them in front of whole texts.

        Args:
            x: texts, [B, T, D], or N packed ones, [1, T, D].
            cu_seqlens: edges of packed texts, [N + 1].

        Returns:
            Texts with them, [B, n + T, D] or [1, N n + T, D]; where the tokens of x are in there, [T]; edges.
        """
        n, (B, T, _) = len(self), x.shape
        token = torch.arange(T, device=x.device)
        front = self.weight.to(x.dtype)
        if cu_seqlens is None:
            return torch.cat((front.expand(B, -1, -1), x), dim=1), n + token, None
        edges = cu_seqlens.long()
        text = torch.arange(len(edges), device=x.device)
        own = token + n * torch.searchsorted(edges, token, right=True)
        edges = edges + n * text
        before = (edges[:-1, None] + torch.arange(n, device=x.device)).flatten()
        order = torch.cat((before, own)).argsort()
        return torch.cat((front.repeat(len(edges) - 1, 1), x[0]))[order][None], own, edges
