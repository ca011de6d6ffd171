"""The checkers of linear/mamba2 pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import mamba2
from effattn_lite.exercises.verdict import Wrong


def numbers(M):
    c = np.diag(M)
    return np.append(1.0, np.diag(M, -1) / c[1:]), np.ones(len(M)), c


def mask(g):
    # row t adds up the gates behind j, from t backwards
    t = np.arange(len(g))
    between = np.where(t[:, None] > t, g[:, None], 0).astype(g.dtype)
    sums = np.cumsum(between, axis=0)
    return np.where(t[:, None] >= t, np.exp(sums), 0).astype(g.dtype)


def difference(g):
    G = np.cumsum(g)
    x = G[:, None] - G
    return np.where(np.tri(len(g)) > 0, np.exp(x), 0).astype(g.dtype)


def own_gate(g):
    return (mask(g) * np.exp(g)).astype(g.dtype)


def pass_states(U, total):
    # rows of the mask over chunks 0..NC-2, one down
    states = np.zeros_like(U)
    states[1:] = np.einsum("ij,jkv->ikv", mask(total[:-1]), U[:-1])
    return states


def behind(U, total):
    return np.einsum("ij,jkv->ikv", mask(total), U)


@pytest.mark.parametrize(
    ("number", "answer"), [(1, (12, 12, 24, 2047)), (2, numbers), (3, mask), (4, pass_states)]
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/mamba2/{number}", answer)
    assert isinstance(getattr(mamba2, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (6, 12, 24, 2047), "M_31"),
        (1, (12, 6, 24, 2047), "M_43"),
        (1, (12, 12, 12, 2047), "M_41"),
        (1, (12, 12, 24, 3072), "choice of units"),
        (1, (12, 12, 24, 1024), "below it"),
        (1, 5, "four numbers"),
        (2, lambda M: (np.ones(len(M)), np.ones(len(M)), np.diag(M)), "b = 1"),
        (2, lambda M: (1, 2), "three arrays"),
        (3, difference, "NaN"),
        (3, own_gate, "g_j itself"),
        (3, lambda g: np.exp(np.minimum(np.cumsum(g)[:, None] - np.cumsum(g), 0)), "above the diagonal"),
        (3, lambda g: mask(g.astype(float)), "dtype"),
        (4, behind, "shift by one"),
        (4, lambda U, total: np.zeros_like(U), "Chunk j"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(mamba2, f"exercise_{number}")(answer)


def test_digits_lost_in_a_difference_are_seen():
    def finite_difference(g):
        if np.isinf(g).any():
            return mask(g)
        return difference(g)

    with pytest.raises(Wrong, match="loses the digits"):
        mamba2.exercise_3(finite_difference)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        mamba2.exercise_5(lambda: None)
