"""The checkers of foundations/attention_cost: a right answer passes, typical wrong ones are told why."""

import math

import numpy as np
import pytest

from effattn_lite.exercises import check

CHAPTER = "foundations/attention_cost"


def smallest_batch(k, n, *, size, ridge):
    left = 2 / (size * ridge) - 1 / k - 1 / n
    return math.ceil(1 / left - 1e-9) if left > 1e-12 else None


class Cache:
    """Arrays of full size, and views of what is in use."""

    def __init__(self, capacity, HKV, K, V):
        self.k, self.v, self.used = np.zeros((capacity, HKV, K)), np.zeros((capacity, HKV, V)), 0

    def append(self, k, v):
        end = self.used + len(k)
        if end > len(self.k):
            raise ValueError("full")
        self.k[self.used : end], self.v[self.used : end] = k, v
        self.used = end
        return self.k[:end], self.v[:end]


class Copies(Cache):
    """Right numbers, in new arrays at every token."""

    def append(self, k, v):
        return tuple(x.copy() for x in super().append(k, v))


class Borrows(Cache):
    """Keeps the caller's arrays, which may change."""

    def append(self, k, v):
        self.parts = [*getattr(self, "parts", []), (k, v)]
        if sum(len(part[0]) for part in self.parts) > len(self.k):
            raise ValueError("full")
        return tuple(np.concatenate(x) for x in zip(*self.parts, strict=True))


class Boundless(Cache):
    """Never full."""

    def __init__(self, capacity, HKV, K, V):
        super().__init__(2 * capacity, HKV, K, V)


def serve(*, weights, size, token, memory, T, copy, product):
    batch = max(0, int((memory - size * weights) // (T * token)))
    shared = max(size * weights / copy, 2 * batch * weights / product)
    return batch, batch / (shared + batch * T * token / copy)


def test_by_hand():
    right = (23040, 3, 2 * 134.5e6 / 23040, 422)
    assert check(f"{CHAPTER}/1", right)
    assert not check(f"{CHAPTER}/1", (..., ..., ..., ...)).started
    for place, wrong, words in (
        (0, 3 * 23040, "query heads have no cache"),
        (1, 1, "each query head that shares it"),
        (2, 134.5e6 / 23040, "2 x 134.5 million bytes"),
        (3, 423, "round down"),
    ):
        verdict = check(f"{CHAPTER}/1", right[:place] + (wrong,) + right[place + 1 :])
        assert not verdict and words in verdict.words
    assert "you gave 2" in check(f"{CHAPTER}/1", (1, 2)).words


def test_smallest_batch():
    assert check(f"{CHAPTER}/2", smallest_batch)
    assert not check(f"{CHAPTER}/2", lambda k, n, *, size, ridge: None).started
    # the large-matrix rule forgets that the matrix has sides
    verdict = check(f"{CHAPTER}/2", lambda k, n, *, size, ridge: math.ceil(size * ridge / 2))
    assert not verdict and "Solve" in verdict.words
    verdict = check(f"{CHAPTER}/2", lambda k, n, **z: smallest_batch(k, n, **z) or 10**9)
    assert not verdict and "expected None" in verdict.words


def test_cache():
    assert check(f"{CHAPTER}/3", Cache)
    assert not check(f"{CHAPTER}/3", lambda *sizes: None).started
    assert "you copied the cache" in check(f"{CHAPTER}/3", Copies).words
    assert "Copy the new rows" in check(f"{CHAPTER}/3", Borrows).words
    assert "ValueError" in check(f"{CHAPTER}/3", Boundless).words


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda z: (serve(**z)[0], serve(**z)[1] / max(1, serve(**z)[0])), "the rate of one text"),
        (lambda z: (serve(**z)[0] + 1, 1.0), "a batch is whole"),
        (lambda z: serve(**z | {"product": math.inf}), "max(weight bytes"),
        (lambda z: serve(**z | {"memory": z["memory"] + z["size"] * z["weights"]}), "beside the weights"),
    ],
    ids=["one_text", "too_many", "no_flops", "no_weights"],
)
def test_serve_says_what_is_wrong(mistake, words):
    verdict = check(f"{CHAPTER}/4", lambda **z: mistake(z))
    assert not verdict and words in verdict.words


def test_serve():
    assert check(f"{CHAPTER}/4", serve)
    assert not check(f"{CHAPTER}/4", lambda **z: None).started
    assert not check(f"{CHAPTER}/4", lambda **z: 3)
