"""The checkers of linear/random_features pass right answers and name the usual mistakes."""

import math

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import random_features
from effattn_lite.exercises.verdict import Wrong
from effattn_lite.reference.performer import draw_omega


def hyperbolic(x, omega, *, share=2, sign=-1):
    u = x @ omega.T
    u = np.concatenate((u, sign * u), axis=-1) - (x**2).sum(-1, keepdims=True) / 2
    return np.exp(u) / (share * len(omega)) ** 0.5


def spread(q, k):
    return math.cosh(((q + k) ** 2).sum()) - 1


def by_channel(a, b, v, *, one=False, carry=True, query=True):
    S, z, m = np.zeros((a.shape[1], v.shape[1])), np.zeros(a.shape[1]), np.full(a.shape[1], -np.inf)
    o = np.zeros_like(v)
    for t in range(len(a)):
        top = np.maximum(m, b[t].max() if one else b[t]) if carry else np.zeros_like(m)
        keep, new = np.exp(m - top) if carry else np.ones_like(m), np.exp(b[t] - top)
        S, z, m = keep[:, None] * S + new[:, None] * v[t], keep * z + new, top
        f = np.exp(a[t] + m - (a[t] + m).max() if query else a[t] + m - m.max())
        o[t] = f @ S / (f @ z)
    return o


def unsigned(rng, M, K):
    Q = [np.linalg.qr(rng.normal(size=(K, K)))[0].T for _ in range(-(-M // K))]
    return np.linalg.norm(rng.normal(size=(M, K)), axis=1, keepdims=True) * np.concatenate(Q)[:M]


def unit(rng, M, K):
    omega = draw_omega(rng, M, K)
    return K**0.5 * omega / np.linalg.norm(omega, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (32, 277, math.exp(8))), (2, (hyperbolic, spread)), (3, by_channel), (4, draw_omega)],
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/random_features/{number}", answer)
    assert isinstance(getattr(random_features, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (8, 277, 2981), "four times as much"),
        (1, (256, 277, 2981), "64 \\*\\* 0.25"),
        (1, (32, 553, 2981), "share a frequency"),
        (1, (32, 277, 55), "Cosines"),
        (1, (32, ..., 2981), "dots"),
        (1, 5, "three numbers"),
        (2, (lambda x, w: hyperbolic(x, w, share=1), spread), "sqrt\\(2 M\\)"),
        (2, (lambda x, w: hyperbolic(x, w, sign=1), spread), "the other"),
        (2, (lambda x, w: hyperbolic(x, w)[..., : len(w)], spread), "expected"),
        (2, (hyperbolic, lambda q, k: math.expm1(((q + k) ** 2).sum())), "plain positive"),
        (2, (lambda x, w: None, spread), "dots"),
        (2, hyperbolic, "two functions"),
        (3, lambda a, b, v: by_channel(a, b, v, carry=False), "maximum"),
        (3, lambda a, b, v: by_channel(a, b, v, one=True), "each channel"),
        (3, lambda a, b, v: by_channel(a, b, v, query=False), "queries"),
        (4, lambda rng, M, K: rng.normal(size=(M, K)), "right angles"),
        (4, unit, "length varies"),
        (4, unsigned, "sign"),
        (4, lambda rng, M, K: None, "dots"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(random_features, f"exercise_{number}")(answer)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        random_features.exercise_5(lambda: None)
