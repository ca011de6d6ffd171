"""The checkers of linear/delta_rule pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import delta_rule
from effattn_lite.exercises.verdict import NotStarted, Wrong


def join(K1, W1, K2, W2):
    return np.concatenate([W1, W2 - W2 @ K1.T @ W1])


def swapped(K1, W1, K2, W2):
    return np.concatenate([W1 - W1 @ K2.T @ W2, W2])


def stacked(K1, W1, K2, W2):
    return np.concatenate([W1, W2])


def chunkwise(q, k, v, *, beta, initial_state, chunk_size, solve=True, first=True):
    S, o = initial_state, np.zeros_like(v)
    for start in range(0, len(q), chunk_size):
        part = slice(start, start + chunk_size)
        qc, kc, b = q[part], k[part], beta[part, None]
        A = np.tril(b * (kc @ kc.T), -1) if solve else np.zeros((len(qc), len(qc)))
        delta = np.linalg.solve(np.eye(len(qc)) + A, b * (v[part] - kc @ S))
        old, S = S, S + kc.T @ delta
        o[part] = qc @ (old if first else S) + np.tril(qc @ kc.T) @ delta
    return o, S


def one_system(q, k, v, *, beta, initial_state, chunk_size):
    return chunkwise(q, k, v, beta=beta, initial_state=initial_state, chunk_size=len(q))


def batch_update(*args, **kwargs):
    return chunkwise(*args, **kwargs, solve=False)


def late_read(*args, **kwargs):
    return chunkwise(*args, **kwargs, first=False)


def greedy(q, k, v, *, beta, initial_state, chunk_size):
    o, S = chunkwise(q, k, v, beta=beta, initial_state=initial_state, chunk_size=chunk_size)
    initial_state[:] = S
    return o, initial_state


def undo(S, k, v, beta):
    b = beta * (k @ k)
    if abs(1 - b) < 1e-12:
        return None
    return S - np.outer(k, beta * (v - (k @ S - b * v) / (1 - b)))


def subtract(S, k, v, beta):
    return S - beta * np.outer(k, v)


def unit_only(S, k, v, beta):
    return None if beta == 1 else S - np.outer(k, beta * (v - (k @ S - beta * v) / (1 - beta)))


def never_lost(S, k, v, beta):
    b = beta * (k @ k)
    return S - np.outer(k, beta * (v - (k @ S - b * v) / (1 - b + 1e-30)))


@pytest.mark.parametrize(("number", "answer"), [(1, (9, 6, 7, 2, 4)), (2, join), (3, chunkwise), (4, undo)])
def test_right_answers_pass(number, answer):
    assert check(f"linear/delta_rule/{number}", answer)
    assert isinstance(getattr(delta_rule, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (8, 6, 7, 2, 4), "adding memory under a"),
        (1, (9, 6, 8, 2, 4), "delta rule under a"),
        (1, (9, 6, 7, 2, 3), "cos"),
        (1, (9, 6, 7), "five numbers"),
        (1, "9", "five numbers"),
        (2, swapped, "acts last"),
        (2, stacked, "again"),
        (2, lambda K1, W1, K2, W2: W1, "shape"),
        (3, batch_update, "earlier tokens wrote"),
        (3, late_read, "state before the chunk"),
        (3, one_system, "T x T"),
        (3, greedy, "initial_state"),
        (3, lambda q, k, v, **_: v, "two results"),
        (4, subtract, "erased too"),
        (4, unit_only, "nothing is lost|solve for r"),
        (4, never_lost, "return None"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(delta_rule, f"exercise_{number}")(answer)


def test_dots_are_no_answer():
    with pytest.raises(NotStarted):
        delta_rule.exercise_1((9, ..., 7, 2, 4))
    assert not check("linear/delta_rule/2", lambda *_: ...).started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        delta_rule.exercise_5(lambda: None)
