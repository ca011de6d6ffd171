"""The checkers of linear/shaped_features pass right answers and name the usual mistakes."""

import math

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import shaped_features
from effattn_lite.exercises.verdict import Wrong


def weight(a, b):
    return 0.5 * (1 + math.tanh(a) * math.tanh(b))


def overflows(a, b):
    return math.cosh(a + b) / (2 * math.cosh(a) * math.cosh(b))


def lift(W, b, sign=-1):
    return np.concatenate((W, -W)), np.concatenate((b, sign * b))


def turning(q, k, v, theta, state, *, turn=True, relu=True, late=False):
    S, z = state
    q, k = (np.maximum(x, 0) if relu else x for x in (q, k))

    def turned(x):
        c, s = math.cos(theta), math.sin(theta)
        return np.stack((c * x[0] + s * x[1], c * x[1] - s * x[0])) if turn else x

    S, z = (S, z) if late else (turned(S), turned(z))
    S[0] += np.outer(k, v)
    z[0] += k
    S, z = (turned(S), turned(z)) if late else (S, z)
    den = q @ z[0]
    return q @ S[0] / (den if abs(den) > 1e-30 else np.inf), (S, z)


def mixed(q, k, v, fq, fk, W, *, width=0, far=True, scale=None):
    S, z, o = np.zeros((fk.shape[1], v.shape[1])), np.zeros(fk.shape[1]), np.zeros_like(v)
    scale = q.shape[1] ** -0.5 if scale is None else scale
    for t in range(len(q)):
        first = t - W + 1 - width
        if first > 0 and far:
            S, z = S + np.outer(fk[first - 1], v[first - 1]), z + fk[first - 1]
        near = slice(max(0, first), t + 1)
        w = np.exp(scale * (k[near] @ q[t]))
        o[t] = (w @ v[near] + fq[t] @ S) / (w.sum() + fq[t] @ z)
    return o


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (600, 1 - math.cos(math.pi / 32), 5 / 8)), (2, (weight, lift)), (3, turning), (4, mixed)],
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/shaped_features/{number}", answer)
    assert isinstance(getattr(shaped_features, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (450, 0.005, 0.625), "60 degrees"),
        (1, (600, 0.1, 0.625), "x\\^2 / 2"),
        (1, (600, 0.0048, 0.5625), "small ones meet"),
        (1, (600, ..., 0.625), "dots"),
        (1, 5, "three numbers"),
        (2, (overflows, lift), "overflow"),
        (2, (weight, lambda W, b: lift(W, b, sign=1)), "bias changes"),
        (2, (weight, lambda W, b: (W, b)), "expected"),
        (2, (weight, lambda W, b: None), "dots"),
        (2, weight, "two functions"),
        (3, lambda *x: turning(*x, turn=False), "nothing turns"),
        (3, lambda *x: turning(*x, relu=False), "count as 0"),
        (3, lambda *x: turning(*x, late=True), "turned with the past"),
        (3, lambda *x: None, "dots"),
        (4, lambda *x: mixed(*x, width=1), "own included"),
        (4, lambda *x: mixed(*x, far=False), "missing"),
        (4, lambda *x: mixed(*x, scale=1.0), "sqrt\\(K\\)"),
        (4, shaped_features._halves, "divide once"),
        (4, shaped_features._mixed, "no table"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(shaped_features, f"exercise_{number}")(answer)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        shaped_features.exercise_5(lambda: None)
