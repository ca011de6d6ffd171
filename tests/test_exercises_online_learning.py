"""The checkers of linear/online_learning pass right answers, and name the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import online_learning
from effattn_lite.exercises.verdict import NotStarted, Wrong

HAND = (10, -2, 10 / 3, 16 / 3, 4)


def nearer(e, k, b):
    return (2 * b - b**2) * (e @ e) / (k @ k)


def batch_step(S, K, V, beta, *, lower=False, explicit=False):
    scores = beta[:, None] * (K @ K.T)
    if lower:
        scores = np.tril(scores)
    error = beta[:, None] * (V - K @ S)
    return S + K.T @ (error if explicit else np.linalg.solve(np.eye(len(beta)) + scores, error))


def wide_step(S, K, V, beta):
    return np.linalg.solve(np.eye(len(S)) + (K.T * beta) @ K, S + K.T @ (beta[:, None] * V))


def divides(S, K, V, beta):
    with np.errstate(all="ignore"):
        scores = K @ K.T + np.diag(1 / beta)
    if np.isinf(scores).any():
        return np.full_like(S, np.nan)
    return S + K.T @ np.linalg.solve(scores, V - K @ S)


def in_place(S, K, V, beta):
    S[:] = batch_step(S, K, V, beta)
    return S


def has_loss(step, K, V):
    zero = step(np.zeros((K, V)))
    J = [(step(e.reshape(K, V)) - zero).ravel() for e in np.eye(K * V)]
    return bool(np.allclose(J, np.transpose(J)))


@pytest.mark.parametrize(("number", "answer"), [(1, HAND), (2, nearer), (3, batch_step), (4, has_loss)])
def test_right_answers_pass(number, answer):
    assert check(f"linear/online_learning/{number}", answer)
    assert isinstance(getattr(online_learning, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (8, *HAND[1:]), "adding"),
        (1, (10, -2, -2, 16 / 3, 4), "of the way"),
        (1, (*HAND[:4], 2), "stands still"),
        (1, HAND[:3], "five numbers"),
        (1, "9", "five numbers"),
        (2, lambda e, k, b: -nearer(e, k, b), "sign"),
        (2, lambda e, k, b: (2 * b - b**2) * (e @ e), "does not cancel"),
        (3, lambda *x: batch_step(*x, explicit=True), "after the step"),
        (3, lambda *x: batch_step(*x, lower=True), "no triangle"),
        (3, divides, "divide by beta"),
        (3, wide_step, "K x K"),
        (3, in_place, "caller's state"),
        (3, lambda S, K, V, beta: K, "expected"),
        (4, lambda *_: True, "KDA's step is no gradient step"),
        (4, lambda *_: False, "DeltaNet's step is a gradient step"),
        (4, lambda *_: 1, "True or False"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(online_learning, f"exercise_{number}")(answer)


def test_dots_are_no_answer():
    with pytest.raises(NotStarted):
        online_learning.exercise_1((10, ..., 3, 2, 1))
    assert not check("linear/online_learning/2", lambda *_: ...).started
    assert not check("linear/online_learning/4", lambda *_: None).started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        online_learning.exercise_5(lambda: None)
