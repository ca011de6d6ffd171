"""The caches of decoding that a sparse mode reads: keys and values, and what it keeps of them."""

from dataclasses import dataclass

import torch

from effattn_lite.layers.common import Cache
from effattn_lite.ops.cache import KVCache

ROOM = 256
"""Tokens that a cache has room for beyond the prompt before its memory grows."""


@dataclass(frozen=True)
class Pages:
    """Rows of a batch in `KVCache`s: in one where they are equally long, else in one each.

    It says how many of the tokens are its own. A cache that goes on twice is copied, so that a call never
    changes what another one has returned.

    Attributes:
        caches: one of all rows, or one a row.
        counts: tokens of each cache that belong to this text.
        prompts: of those, how many were read before the first was written.
    """

    caches: tuple[KVCache, ...]
    counts: tuple[int, ...]
    prompts: tuple[int, ...]

    @classmethod
    def of(cls, rows) -> "Pages":
        """The `Rows` of a prompt, parts "k" and "v", copied."""
        parts = [rows.parts] if rows.edges is None else list(rows)
        caches = tuple(KVCache(part["k"], part["v"], capacity=part["k"].shape[1] + ROOM) for part in parts)
        counts = tuple(len(kv) for kv in caches)
        return cls(caches, counts, counts)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> "Pages":
        """With one token more of every row, k [N, 1, HKV, K] and v [N, 1, HKV, V]."""
        caches = []
        for kv, n, new in zip(self.caches, self.counts, self.split(k, v), strict=True):
            if len(kv) != n:  # another text has gone on from here
                kv = KVCache(kv.k[:, :n], kv.v[:, :n], capacity=n + ROOM)
            kv.append(*new)
            caches.append(kv)
        return Pages(tuple(caches), tuple(n + 1 for n in self.counts), self.prompts)

    def split(self, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Tensors [N, ...] of all rows, as each cache has its rows."""
        if len(self.caches) == 1:
            return [tensors]
        return list(zip(*(x.split(1) for x in tensors), strict=True))

    def rows(self) -> Cache:
        """As a dense cache has it: "k" and "v", packed with "edges" where rows have caches of their own."""
        k, v = (
            [getattr(kv, name)[:, :n] for kv, n in zip(self.caches, self.counts, strict=True)]
            for name in "kv"
        )
        if len(self.caches) == 1:
            return {"k": k[0], "v": v[0]}
        edges = torch.tensor([0, *self.counts], device=k[0].device).cumsum(0)
        return {"k": torch.cat(k, dim=1), "v": torch.cat(v, dim=1), "edges": edges}

    @property
    def nbytes(self) -> int:
        """Bytes of all caches: spare room and what a method keeps of pages among them."""
        return sum(kv.nbytes for kv in self.caches)
