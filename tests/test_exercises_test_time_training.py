"""The checkers of linear/test_time_training pass right answers, and name the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import test_time_training as checkers
from effattn_lite.exercises.verdict import Wrong

HAND = (15 / 16, 2, 1, 1 / 8)


def scaled(w, b, eta, c, *, power=2, bias=True):
    return c * w, c * b if bias else b, c**power * eta


def minibatch(q, k, g, eta, W, b, *, ones=1, diagonal=0, by_reader=False):
    step = g if by_reader else eta[:, None] * g
    read = np.tril(q @ k.T + ones, diagonal) @ step
    step = eta[:, None] * g
    return q @ W + b - (eta[:, None] * read if by_reader else read), W - k.T @ step, b - step.sum(0)


def rounds(k, v, eta, W, b, gradient, m, *, diagonal=-1):
    z = start = k @ W + b
    table = np.tril(k @ k.T + 1, diagonal)
    for _ in range(m):
        g = gradient(z, v - k)
        z = start - table @ (eta[:, None] * g)
    return g


@pytest.mark.parametrize(("number", "answer"), [(1, HAND), (2, scaled), (3, minibatch), (4, rounds)])
def test_right_answers_pass(number, answer):
    assert check(f"linear/test_time_training/{number}", answer)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (15 / 16, 15 / 16, 1, 1 / 8), "All four gradients"),
        (1, (15 / 16, 2, 15 / 16, 1 / 8), "After the first two"),
        (1, (15 / 16, 2, 1, 2), "1 - 16 eta"),
        (1, 7, "four numbers"),
        (2, lambda *x: scaled(*x, power=1), "Gradients are 1/c"),
        (2, lambda *x: scaled(*x, power=0), "Gradients are 1/c"),
        (2, lambda *x: scaled(*x, bias=False), "The bias"),
        (2, lambda *x: 1, "expected .w, b, eta"),
        (3, lambda *x: minibatch(*x, ones=0), "Row i sums"),
        (3, lambda *x: minibatch(*x, diagonal=-1), "Row i sums"),
        (3, lambda *x: minibatch(*x, by_reader=True), "Row i sums"),
        (3, lambda *x: minibatch(*x)[:2], "expected .Z, W, b"),
        (4, lambda *x: rounds(*x, diagonal=0), "not its own"),
        (4, lambda *x: rounds(*x[:-1], x[-1] + 1), "first round"),
        (4, lambda *x: rounds(*x[:-1], 1), "steps of the tokens before it"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(checkers, f"exercise_{number}")(answer)


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (...,) * 4), (2, lambda *x: (..., ..., ...)), (3, lambda *x: (..., ..., ...)), (4, lambda *x: ...)],
)
def test_dots_are_not_started(number, answer):
    assert not check(f"linear/test_time_training/{number}", answer).started


def test_writing_into_the_callers_model_is_refused():
    def greedy(q, k, g, eta, W, b):
        Z, new, bias = minibatch(q, k, g, eta, W, b)
        W[:] = new
        return Z, new, bias

    with pytest.raises(Wrong, match="in place"):
        checkers.exercise_3(greedy)


def test_the_gradient_of_the_checkers_is_the_reference():
    from effattn_lite.reference.ttt_linear import gradient

    z, target, weight, bias = np.random.default_rng(0).normal(size=(4, 7))
    np.testing.assert_allclose(
        checkers._gradient(z, target, weight, bias), gradient(z, target, weight, bias), rtol=1e-10
    )


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        checkers.exercise_5(lambda: None)
