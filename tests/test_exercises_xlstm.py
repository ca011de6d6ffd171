"""The checkers of linear/xlstm pass right answers, and say what is wrong with the usual mistakes."""

import math

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import xlstm
from effattn_lite.exercises.verdict import Wrong


def combine(first, second):
    (F1, m1, S1), (F2, m2, S2) = first, second
    m = max(m1 + F2, m2)
    return F1 + F2, m, np.exp(m1 + F2 - m) * S1 + np.exp(m2 - m) * S2


def unfaded(first, second):
    (F1, m1, S1), (F2, m2, S2) = first, second
    m = max(m1, m2)
    return F1 + F2, m, np.exp(m1 - m) * S1 + np.exp(m2 - m) * S2


def loud(first, second):
    # right in real numbers: the exponentials leave the range
    (F1, m1, S1), (F2, m2, S2) = first, second
    m = max(m1 + F2, m2)
    return F1 + F2, m, np.exp(-m) * (np.exp(m1 + F2) * S1 + np.exp(m2) * S2)


def step(q, k, v, *, i, f, state):
    C, n, m = state
    faded = m - np.logaddexp(0, -f)
    m = max(faded, i)
    past, own = np.exp(faded - m), np.exp(i - m)
    C, n = past * C + own * np.outer(k, v), past * n + own * k
    with np.errstate(over="ignore"):
        return (q @ C) / max(abs(q @ n), np.exp(-m)), (C, n, m)


def bound_of_one(q, k, v, *, i, f, state):
    _, (C, n, m) = step(q, k, v, i=i, f=f, state=state)
    return (q @ C) / max(abs(q @ n), 1), (C, n, m)


def plain(q, k, v, *, i, f, state):
    C, n, m = state
    keep = 1 / (1 + np.exp(-f))
    C, n = keep * C + np.exp(i) * np.outer(k, v), keep * n + np.exp(i) * k
    return (q @ C) / max(abs(q @ n), 1), (C, n, m)


CELL = ((20, -3, 20), (-20, 0, 0), (50, -50, -50), -10)


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (5.25, math.log(4), 1.3125, 16 / 21)), (2, combine), (3, step), (4, CELL)],
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/xlstm/{number}", answer)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (9.25, math.log(4), 1.3125, 16 / 21), "halved twice"),
        (1, (5.25, math.log(8), 1.3125, 16 / 21), "stabiliser fades"),
        (1, (5.25, math.log(4), 21, 16 / 21), "times e"),
        (1, 7, "four numbers"),
        (2, unfaded, "faded"),
        (2, loud, "infinite or not a number"),
        (2, lambda a, b: a, "logs add"),
        (3, plain, "m gives"),
        (3, bound_of_one, "bound of 1"),
        (4, ((3, -3, 20), (-10, 10, 10), (50, 50, 50), -10), "averaged|whispers"),
        (4, ((3, -3, 20), (-20, 0, 0), (50, -50, -50), -10), "whispers"),
        (4, ((20, -3, 20), (-20, 0, 0), -10), "three numbers"),
        (4, ((20, 3, 20), (-20, 0, 0), (50, -50, -50), 0), "expected near"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(xlstm, f"exercise_{number}")(answer)


@pytest.mark.parametrize(
    "number, answer", [(1, (...,) * 4), (2, lambda a, b: (..., ..., ...)), (4, ((...,) * 3,) * 3 + (...,))]
)
def test_dots_are_not_started(number, answer):
    assert not check(f"linear/xlstm/{number}", answer).started


def test_writing_into_the_callers_state_is_refused():
    def greedy(q, k, v, *, i, f, state):
        o, new = step(q, k, v, i=i, f=f, state=state)
        state[0][:] = new[0]
        return o, new

    with pytest.raises(Wrong, match="in place"):
        xlstm.exercise_3(greedy)


def test_the_cell_of_the_checker_is_the_reference():
    from effattn_lite.reference.slstm import recurrent

    text = np.random.default_rng(0).integers(3, size=50)
    z, i, f = (np.array(row, float)[text].reshape(1, -1, 1, 1) for row in CELL[:3])
    R = {f"r_{g}": np.zeros((1, 1, 1)) for g in "zifo"} | {"r_z": np.full((1, 1, 1), -10.0)}
    y, _ = recurrent(z, i=i, f=f, o=0 * z + 50, **R)
    cell, h = (0.0, 0.0, 0.0, -math.inf), []
    for token in text:
        cell = xlstm._cell(*(row[token] for row in CELL[:3]), CELL[3], cell)
        h.append(cell[2])
    np.testing.assert_allclose(y.ravel(), h, rtol=1e-10)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        xlstm.exercise_5(lambda: None)
