"""The checkers of linear/gates pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import gates
from effattn_lite.exercises.verdict import NotStarted, Wrong
from effattn_lite.explore import ForgetGates
from effattn_lite.explore.forget_gates import BEST_DECAY, answers

RIGHT = (4 / 5, 4 / 9, 5, 256)


def weights(f):
    behind = np.append(np.cumprod(f[::-1])[::-1], 1.0)
    return np.append(behind[0], (1 - f) * behind[1:])


def dividing(f):
    P = np.cumprod(f)
    return np.append(P[-1], (1 - f) * P[-1] / P)


def dyadic(q, k, g):
    A = np.diag((q * k).sum(1))
    half = 1
    while half < len(q):
        for a in range(0, len(q), 2 * half):
            m = a + half
            reader = np.exp(np.cumsum(g[m : m + half], axis=0))
            later = np.concatenate((g[a + 1 : m], 0 * g[:1]))
            writer = np.exp(np.cumsum(later[::-1], axis=0)[::-1])
            A[m : m + half, a:m] = (q[m : m + half] * reader) @ (k[a:m] * writer).T
        half *= 2
    return A


def split(q, k, g):
    G = np.cumsum(g, axis=0)
    return np.tril((q * np.exp(G)) @ (k * np.exp(-G)).T)


def table(q, k, g):
    G = np.cumsum(g, axis=0)
    seen = np.tri(len(q), dtype=bool)[..., None]
    return np.einsum("ik,ijk,jk->ij", q, np.exp(np.where(seen, G[:, None] - G, -np.inf)), k)


def summed_table(q, k, g):
    i = np.arange(len(q))
    later = (i[:, None] > i)[..., None]
    between = np.where(later, g[:, None], 0).cumsum(0)
    seen = (i[:, None] >= i)[..., None]
    return np.einsum("ik,ijk,jk->ij", q, np.exp(np.where(seen, between, -np.inf)), k)


def writers_gate(q, k, g):
    return dyadic(q, k, np.roll(g, 1, axis=0))


def late_reader(q, k, g):
    return dyadic(q, k, np.concatenate((0 * g[:1], g[:-1])) * (np.arange(len(g)) != 1)[:, None])


def turn(q, k, g, theta, total=True, sign=1):
    angle = np.cumsum(theta, axis=0) if total else theta
    q2 = np.concatenate((np.cos(angle) * q, np.sin(angle) * q), axis=1)
    k2 = np.concatenate((np.cos(angle) * k, sign * np.sin(angle) * k), axis=1)
    return q2, k2, np.concatenate((g, g), axis=1)


@pytest.mark.parametrize(("number", "answer"), [(1, RIGHT), (2, weights), (3, dyadic), (4, turn)])
def test_right_answers_pass(number, answer):
    assert check(f"linear/gates/{number}", answer)
    assert isinstance(getattr(gates, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (0.2, 4 / 9, 5, 256), "keep"),
        (1, (0.8, 0.5, 5, 256), "many topics"),
        (1, (0.8, 4 / 9, 4.6, 256), "tokens"),
        (1, (0.8, 4 / 9, 5, 64), "one block"),
        (1, (1, 2), "four numbers"),
        (2, lambda f: np.append(0, (1 - f)), "meets the gates"),
        (2, lambda f: weights(f)[1:], "one weight more"),
        (2, lambda f: weights(f)[::-1], "other order"),
        (2, lambda f: np.append(np.prod(f), 1 - f), "add up to"),
        (2, dividing, "do not divide"),
        (3, split, "positive"),
        (3, table, "difference of two large sums"),
        (3, summed_table, "MB"),
        (3, late_reader, "its own gate"),
        (3, lambda q, k, g: dyadic(q, k, g) - np.diag((q * k).sum(1)), "no gate"),
        (3, lambda q, k, g: q @ k.T, "above the diagonal"),
        (4, lambda *x: turn(*x, total=False), "running sum"),
        (4, lambda *x: turn(*x, sign=-1), "backwards"),
        (4, lambda q, k, g, theta: (q, k, g), "shape"),
        (4, lambda q, k, g, theta: q, "three arrays"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(gates, f"exercise_{number}")(answer)


def test_dots_are_not_started():
    for number, answer in ((1, (..., ..., ..., ...)), (2, lambda f: ...), (4, lambda *x: (..., ..., ...))):
        with pytest.raises(NotStarted):
            getattr(gates, f"exercise_{number}")(answer)
        assert not check(f"linear/gates/{number}", answer).started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        gates.exercise_5(lambda: None)


def test_the_figure_is_the_puzzle():
    """Squared errors of its text: 1 when all is kept, at least 1/2 with one gate, 0 with a gate a row."""
    right, one = np.eye(3)[[1, 2, 0]], np.ones(8)

    def error(name, code):
        return ((answers(name, code) - right) ** 2).sum()

    forget = one.copy()
    forget[4] = 0
    assert error(one, one) == 1 and error(one, forget) == 0
    draws = np.random.default_rng(0).uniform(size=(2000, 8)) ** 0.1
    assert min(error(g, g) for g in draws) >= 0.5
    constant = min(np.linspace(0, 1, 201), key=lambda g: error(g * one, g * one))
    assert np.isclose(constant, BEST_DECAY) and ForgetGates().state["name_gates"] == [BEST_DECAY] * 8
    assert ForgetGates(name_gates=0.5 * one).state["code_gates"] == [0.5] * 8
    with pytest.raises(ValueError, match="expected 8 numbers"):
        ForgetGates(code_gates=[1, 2])
