"""The checkers of linear/fixed_decay pass right answers, and say what is wrong with the usual mistakes."""

import math

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import fixed_decay
from effattn_lite.exercises.verdict import Wrong


def combine(first, second):
    return first[0] + second[0], math.exp(second[0]) * first[1] + second[1]


def chunkwise(q, k, v, *, g, initial_state, chunk_size):
    S, o = initial_state, np.zeros_like(v)
    for start in range(0, len(q), chunk_size):
        part = slice(start, start + chunk_size)
        qc, kc, vc = q[part], k[part], v[part]
        i = np.arange(len(qc))
        lag = i[:, None] - i
        D = np.where(lag >= 0, np.exp(g * np.abs(lag)), 0)
        o[part] = (D * (qc @ kc.T)) @ vc + np.exp(g * (i + 1))[:, None] * (qc @ S)
        S = np.exp(g * len(i)) * S + kc.T @ (np.exp(g * (i[-1] - i))[:, None] * vc)
    return o, S


def parallel(q, k, v, *, g, initial_state, chunk_size):
    return chunkwise(q, k, v, g=g, initial_state=initial_state, chunk_size=len(q))


def late_start(q, k, v, *, g, initial_state, chunk_size):
    # reads the old state one decay too few
    S, o = initial_state, np.zeros_like(v)
    for start in range(0, len(q), chunk_size):
        part = slice(start, start + chunk_size)
        i = np.arange(len(q[part]))
        right, S2 = chunkwise(q[part], k[part], v[part], g=g, initial_state=0 * S, chunk_size=len(i))
        o[part] = right + np.exp(g * i)[:, None] * (q[part] @ S)
        S = np.exp(g * len(i)) * S + S2
    return o, S


def split(q, k, v, *, g, initial_state, chunk_size):
    # right in real numbers: e^(g i) and e^(-g j) apart
    S, o = initial_state, np.zeros_like(v)
    for start in range(0, len(q), chunk_size):
        part = slice(start, start + chunk_size)
        i = np.arange(len(q[part]))[:, None]
        A = np.tril((np.exp(g * i) * q[part]) @ (np.exp(-g * i) * k[part]).T)
        o[part] = A @ v[part] + np.exp(g * (i + 1)) * (q[part] @ S)
        S = np.exp(g * len(i)) * S + k[part].T @ (np.exp(g * (i[-1] - i)) * v[part])
    return o, S


def step(q, k, v, *, g, u, state):
    kv = np.outer(k, v)
    return q @ (state + u[:, None] * kv), np.exp(g)[:, None] * state + kv


def retnet_step(q, k, v, *, g, u, state):
    state = np.exp(g)[:, None] * state + np.outer(k, v)
    return q @ state, state


def no_bonus(q, k, v, *, g, u, state):
    return q @ (state + np.outer(k, v)), np.exp(g)[:, None] * state + np.outer(k, v)


def value_axis(q, k, v, *, g, u, state):
    return q @ state + (q @ (u * k)) * v, np.exp(g) * state + np.outer(k, v)


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (9, 146, 693.8)), (2, combine), (3, chunkwise), (4, step)],
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/fixed_decay/{number}", answer)
    assert isinstance(getattr(fixed_decay, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (10, 146, 693.8), "counted from 0"),
        (1, (9, 145, 693.8), "tokens"),
        (1, (9, 146, 500), "half-life"),
        (1, None, "three numbers"),
        (2, lambda a, b: (a[0] + b[0], a[1] + b[1]), "two tokens"),
        (2, lambda a, b: (a[0] + b[0], math.exp(a[0]) * b[1] + a[1]), "later state"),
        (2, lambda a, b: (a[0] * b[0], math.exp(b[0]) * a[1] + b[1]), "logs add"),
        (3, lambda q, k, v, **_: (np.zeros_like(v), np.zeros((5, 3))), "inside a chunk"),
        (3, lambda q, k, v, **_: None, "two results"),
        (3, late_start, "later ones read"),
        (3, parallel, "T x T"),
        (3, split, "overflows"),
        (4, retnet_step, "after the write"),
        (4, no_bonus, "bonus u is missing"),
        (4, value_axis, "key axis"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(fixed_decay, f"exercise_{number}")(answer)


def test_writing_into_the_callers_state_is_refused():
    def greedy(q, k, v, *, g, initial_state, chunk_size):
        o, S = chunkwise(q, k, v, g=g, initial_state=initial_state, chunk_size=chunk_size)
        initial_state[:] = S
        return o, initial_state

    with pytest.raises(Wrong, match="initial_state"):
        fixed_decay.exercise_3(greedy)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        fixed_decay.exercise_5(lambda: None)
