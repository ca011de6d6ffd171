"""What attention keeps of each row of a batch; rows may differ in length without any padding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from effattn_lite.layers.common import Cache

EDGES = "edges"
LENGTH = "length"
PAGES = "pages"
"""Where a sparse mode keeps its `Pages` instead of keys and values."""


@dataclass(frozen=True)
class Rows:
    """Named tensors of all tokens that a new query may see.

    Attributes:
        parts: name -> [B, n, ...] where rows are equally long, else packed, [1, sum of n, ...].
        edges: [N + 1] int64, where packed rows begin and end; None where they are equally long.
    """

    parts: dict[str, torch.Tensor]
    edges: torch.Tensor | None = None

    @classmethod
    def extend(
        cls, cache: Cache | None, new: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None = None
    ) -> "Rows":
        """The rows of a cache with new tokens behind each; `new` has [B, T, ...], or packed [1, T, ...]."""
        if not cache:
            return cls(new, None if cu_seqlens is None else cu_seqlens.long())
        if PAGES in cache:
            cache = cache[PAGES].rows()
        if EDGES not in cache:
            return cls({name: torch.cat((cache[name], x), dim=1) for name, x in new.items()})
        old = cls({name: cache[name] for name in new}, cache[EDGES])
        rows = [
            {name: torch.cat((row[name], new[name][i : i + 1]), dim=1) for name in new}
            for i, row in enumerate(old)
        ]
        return cls._packed(rows, cache[EDGES].device)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Every row alone, tensors [1, n, ...]."""
        if self.edges is None:
            for i in range(len(next(iter(self.parts.values())))):
                yield {name: x[i : i + 1] for name, x in self.parts.items()}
            return
        edges = self.edges.tolist()
        for a, b in zip(edges, edges[1:], strict=False):
            yield {name: x[:, a:b] for name, x in self.parts.items()}

    def attend(self, function: Callable[..., torch.Tensor], q: torch.Tensor) -> torch.Tensor:
        """What `function(q, k, v)` makes of queries [B, T, H, K]; rows that differ in length go alone."""
        if self.edges is None:
            return function(q, self.parts["k"], self.parts["v"])
        # packed queries, all of them new, or some of every row
        packed = len(q) == 1 and q.shape[1] == self.parts["k"].shape[1]
        queries = q.split(self.edges.diff().tolist(), dim=1) if packed else q.split(1)
        parts = [function(part, row["k"], row["v"]) for part, row in zip(queries, self, strict=True)]
        return torch.cat(parts, dim=1 if packed else 0)

    def keep(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> Cache:
        """The cache for later tokens: of every row, [., n, ...], what `cut` leaves."""
        if self.edges is None:
            return {name: cut(x) for name, x in self.parts.items()}
        rows = [{name: cut(x) for name, x in row.items()} for row in self]
        left = self._packed(rows, self.edges.device)
        return left.parts | {EDGES: left.edges}

    @classmethod
    def _packed(cls, rows, device):
        parts = {name: torch.cat([row[name] for row in rows], dim=1) for name in rows[0]}
        lengths = [next(iter(row.values())).shape[1] for row in rows]
        return cls(parts, torch.tensor([0, *lengths], device=device).cumsum(0))


def places(
    x: torch.Tensor, cache: Cache | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of new tokens in their texts, [B, T] or [1, T], and the tokens of each text after them, [N].

    Args:
        x: new tokens, [B, T, ...].
        cache: with the count so far, [N] int64, under "length"; None or empty begins texts.
        cu_seqlens: edges of packed texts, all of them new.
    """
    token = torch.arange(x.shape[1], device=x.device)[None]
    if cu_seqlens is not None:
        edges = cu_seqlens.long()
        return token - edges[torch.searchsorted(edges, token, right=True) - 1], edges.diff()
    before = cache[LENGTH] if cache else torch.zeros(len(x), dtype=torch.long, device=x.device)
    return token + before[:, None], before + x.shape[1]
