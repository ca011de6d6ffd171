"""The KV cache of decoding: keys and values of all tokens so far, each in one piece of memory."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from effattn_lite.ops import common


class KVCache:
    """Keys and values of B sequences of equal length T, and what a method keeps of their pages.

    Memory for `capacity` tokens is taken at once, and twice as much when it is full: a new token is copied in
    behind the others, and none of them moves. A page is a view of `size` tokens. Values are kept, no graph:
    nothing is differentiated through a cache. A refused call changes nothing.

    Args:
        k: keys of the first tokens, [B, T, HKV, K]; positions already in them; T may be 0. They are copied.
        v: their values, [B, T, HKV, V].
        capacity: tokens to have room for; default T.

    Raises:
        ValueError: shapes or devices do not fit, or capacity < T.
        TypeError: k and v have different dtypes.

    Cost: B capacity HKV (K + V) numbers.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, *, capacity: int | None = None):
        sizes = {}
        common.check_shape("k", k, "B T HKV K", sizes)
        common.check_shape("v", v, "B T HKV V", sizes, like="k")
        common.check_alike("v", v, k, like="k")
        room = sizes["T"] if capacity is None else capacity
        if room < sizes["T"]:
            raise ValueError(f"capacity is {room}, expected >= T = {sizes['T']}")
        self._length, self._summaries, self._spans = 0, {}, {}
        self._k, self._v = (x.new_empty((x.shape[0], room, *x.shape[2:])) for x in (k, v))
        self.append(k, v)

    def __len__(self) -> int:
        """T, the number of tokens."""
        return self._length

    @property
    def k(self) -> torch.Tensor:
        """Keys of all tokens, [B, T, HKV, K], a view."""
        return self._k[:, : self._length]

    @property
    def v(self) -> torch.Tensor:
        """Values of all tokens, [B, T, HKV, V], a view."""
        return self._v[:, : self._length]

    @property
    def capacity(self) -> int:
        """Tokens that fit before memory has to grow."""
        return self._k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds: keys and values, room for more, and what was made of pages and spans."""
        made = [x for x, _, _ in self._summaries.values()]
        made += [kept for kept, _ in self._spans.values()]
        return self._k.nbytes + self._v.nbytes + sum(map(_bytes, made))

    @property
    def positions(self) -> torch.Tensor:
        """Positions of all tokens, [T] int64; the next one's is T."""
        return torch.arange(self._length, device=self._k.device)

    def pages(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole pages, [B, T // size, size, HKV, K] keys and [B, T // size, size, HKV, V] values, as views.

        The T % size newest tokens are in none of them.
        """
        if size < 1:
            raise ValueError(f"size is {size}, expected >= 1")
        n = self._length // size
        return tuple(x[:, : n * size].unflatten(1, (n, size)) for x in (self._k, self._v))

    @torch.no_grad()
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add one token a sequence, k [B, HKV, K] and v [B, HKV, V], or n of them, [B, n, HKV, ...].

        Raises as the constructor does.
        """
        k, v = self._checked(k, v)
        end = self._length + k.shape[1]
        if end > self.capacity:
            self._k, self._v = (_grown(x, self._length, max(end, 2 * x.shape[1])) for x in (self._k, self._v))
        self._k[:, self._length : end], self._v[:, self._length : end] = k, v
        self._length = end

    @torch.no_grad()
    def rewrite(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put others in the place of the newest n keys and values, k [B, n, HKV, K], v [B, n, HKV, V].

        Raises as the constructor does, and ValueError if n > T.
        """
        k, v = self._checked(k, v)
        start = self._length - k.shape[1]
        if start < 0:
            raise ValueError(f"k has shape {tuple(k.shape)}, expected at most T = {self._length} tokens")
        self._k[:, start : self._length], self._v[:, start : self._length] = k, v
        self._forget(start)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, 0 <= length <= T."""
        if not 0 <= length <= self._length:
            raise ValueError(f"length is {length}, expected 0 to T = {self._length}")
        self._length = length
        self._forget(length)

    @torch.no_grad()
    def summary(
        self, name: str, size: int, function: Callable[[torch.Tensor], torch.Tensor], source: object = None
    ) -> torch.Tensor:
        """What a function makes of the keys of each whole page, computed once a page.

        Args:
            name: under which it is kept.
            size: tokens in a page.
            function: keys of some pages, [B, n, size, HKV, K] -> [B, n, ...].
            source: what the function depends on beside the keys; another object begins a new summary.

        Returns:
            [B, T // size, ...], a view.
        """
        n, old = self._length // size, self._summaries.get((name, size))
        if old is None or old[2] is not source:
            old = None, 0, source
        x, done, _ = old
        if x is None or done < n:
            new = function(self.pages(size)[0][:, done:])
            if x is None or x.shape[1] < n:
                x = _grown(new if x is None else x, done, self.capacity // size)
            x[:, done:n] = new
        self._summaries[(name, size)] = x, max(n, done), source
        return x[:, :n]

    @torch.no_grad()
    def spans(
        self,
        name: str,
        edges: Sequence[int],
        function: Callable[[torch.Tensor], object],
        source: object = None,
    ) -> list:
        """What a function makes of the keys from each edge to the next, computed once a span.

        Args:
            name: under which it is kept.
            edges: token numbers that rise, 0 to T.
            function: keys of a span, [B, n, HKV, K] -> a tensor, or a tuple of them.
            source: as in `summary`.

        Returns:
            One entry a span: the same objects as long as none of their keys has changed.
        """
        old, made_from = self._spans.get(name, ({}, source))
        old = old if made_from is source else {}
        kept = {
            span: old[span] if span in old else function(self._k[:, slice(*span)]) for span in pairwise(edges)
        }
        self._spans[name] = kept, source
        return list(kept.values())

    def _forget(self, length):
        """What was made of tokens that are not among the first `length` is to be made again."""
        for name, (kept, source) in self._spans.items():
            self._spans[name] = {span: x for span, x in kept.items() if span[1] <= length}, source
        for (name, size), (x, done, source) in self._summaries.items():
            self._summaries[(name, size)] = x, min(done, length // size), source

    def _checked(self, k, v):
        if k.ndim == 3 and v.ndim == 3:
            k, v = k[:, None], v[:, None]
        B, _, HKV, K = self._k.shape
        sizes = dict(B=B, HKV=HKV, K=K, V=self._v.shape[3])
        common.check_shape("k", k, "B n HKV K", sizes, like="the cache")
        common.check_shape("v", v, "B n HKV V", sizes, like="the cache")
        for name, x in (("k", k), ("v", v)):
            common.check_alike(name, x, self._k, like="the cache")
        return k, v


def _bytes(made):
    if isinstance(made, torch.Tensor):
        return made.nbytes
    return sum(map(_bytes, made.values() if isinstance(made, dict) else made)) if made is not None else 0


def _grown(x, length, room):
    """The first `length` of x [B, ...] in memory for `room`."""
    wider = x.new_empty((x.shape[0], room, *x.shape[2:]))
    wider[:, :length] = x[:, :length]
    return wider
