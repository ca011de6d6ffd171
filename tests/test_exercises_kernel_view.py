"""The checkers of linear/kernel_view pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import kernel_view
from effattn_lite.exercises.verdict import Wrong


def most(phi):
    z = phi.sum(0)
    return (phi[:, z > 0] / z[z > 0]).max(1)


def square(x, *, double=False, half=0.5, scale=True):
    K = x.shape[-1]
    x = x * K**-0.25 if scale else x
    i, j = np.indices((K, K)).reshape(2, -1) if double else np.triu_indices(K)
    pairs = x[..., i] * x[..., j] * np.sqrt(half * np.where((i == j) | double, 1, 2))
    return np.concatenate((np.ones_like(x[..., :1]), x, pairs), axis=-1)


def windowed(q, k, v, W, *, leaves=0):
    S, z, o = np.zeros((k.shape[1], v.shape[1])), np.zeros(k.shape[1]), np.zeros_like(v)
    for t in range(len(q)):
        S, z = S + np.outer(k[t], v[t]), z + k[t]
        old = t - W - leaves
        if old >= 0:
            S, z = S - np.outer(k[old], v[old]), z - k[old]
        o[t] = q[t] @ S / (q[t] @ z)
    return o


def by_table(q, k, v, W):
    A = np.tril(q @ k.T) - np.tril(q @ k.T, -W)
    return A @ v / A.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("number", "answer"), [(1, (20 / 7, 129, 153)), (2, most), (3, square), (4, windowed)]
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/kernel_view/{number}", answer)
    assert isinstance(getattr(kernel_view, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (13 / 3, 129, 153), "plain mean"),
        (1, (2.857, 128, 153), "z as well"),
        (1, (2.857, 129, 273), "one feature"),
        (1, (..., 129, 153), "dots"),
        (1, 3, "three numbers"),
        (2, lambda phi: (phi / phi.sum(0)).min(1), "smallest"),
        (2, lambda phi: phi.max(1) / phi.sum(0).max(), "mixes two channels"),
        (2, lambda phi: np.nan_to_num(phi / phi.sum(0), nan=1).max(1), "second channel is empty"),
        (3, lambda x: square(x, double=True), "are enough"),
        (3, lambda x: square(x, half=1), "lacks its half"),
        (3, lambda x: square(x, scale=False), "K \\*\\* -0.25"),
        (3, lambda x: None, "dots"),
        (4, lambda q, k, v, W: windowed(q, k, v, W, leaves=1), "W \\+ 1 tokens"),
        (4, lambda q, k, v, W: windowed(q, k, v, len(q)), "nothing leaves"),
        (4, by_table, "no table of scores"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(kernel_view, f"exercise_{number}")(answer)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        kernel_view.exercise_5(lambda: None)
