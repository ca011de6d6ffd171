"""The checkers of linear/bidirectional pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import bidirectional
from effattn_lite.exercises.verdict import NotStarted, Wrong
from effattn_lite.explore import Squeeze
from effattn_lite.explore.squeeze import squeezed

RIGHT = (0.6, 16, 33_554_432, 7)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def squared_error(p, w, M):
    return ((p @ p) * (w @ w) + (p @ w) ** 2) / M


def padded(q, k, v, e, f, length, keys_too=True, values_too=True):
    n, m = (length if cut else len(q) for cut in (keys_too, values_too))
    return softmax(q @ (e[:n].T @ k[:n]).T / q.shape[1] ** 0.5) @ (f[:m].T @ v[:m])


def step(state, q, k, v, c, p, scale=None, pack_scale=None):
    s = p @ c * (len(c) ** -0.5 if pack_scale is None else pack_scale)
    M = len(s)
    keys, values, z = state or (np.zeros((M, len(k))), np.zeros((M, len(v))), np.full(M, -np.inf))
    past, z = z, np.logaddexp(z, s)
    keep, w = np.exp(past - z)[:, None], np.exp(s - z)[:, None]
    keys, values = keep * keys + w * k, keep * values + w * v
    return (keys, values, z), softmax(keys @ q * (len(q) ** -0.5 if scale is None else scale)) @ values


def summing(state, q, k, v, c, p, divide=True):
    w = np.exp(p @ c / len(c) ** 0.5)[:, None]
    keys, values, total = state or (0, 0, 0)
    state = keys, values, total = keys + w * k, values + w * v, total + w
    total = total if divide else 1
    return state, softmax(keys / total @ q / len(q) ** 0.5) @ (values / total)


@pytest.mark.parametrize(("number", "answer"), [(1, RIGHT), (2, squared_error), (3, padded), (4, step)])
def test_right_answers_pass(number, answer):
    assert check(f"linear/bidirectional/{number}", answer)
    assert isinstance(getattr(bidirectional, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (0.36, *RIGHT[1:]), "squares"),
        (1, (0.6, 32, *RIGHT[2:]), "projected"),
        (1, (*RIGHT[:2], 16_777_216, 7), "two matrices"),
        (1, (*RIGHT[:3], 6.1), "not a weight"),
        (1, (*RIGHT[:3], 6), "no choice"),
        (1, (1, 2), "four numbers"),
        (2, lambda p, w, M: (p @ p) * (w @ w) / M, "fluctuates"),
        (2, lambda p, w, M: squared_error(p, w, 1), "independent columns"),
        (2, lambda p, w, M: squared_error(p, w, M) ** 0.5, "square root"),
        (2, lambda p, w, M: p * w, "shape"),
        (3, lambda *a: padded(*a[:5], len(a[0])), "still in every row"),
        (3, lambda *a: padded(*a, values_too=False), "values of the padding"),
        (3, lambda *a: padded(*a, keys_too=False), "keys of the padding"),
        (3, lambda *a: padded(*a)[:-1], "shape"),
        (4, lambda *a: step(*a, scale=1.0), "K \\*\\* -0.5"),
        (4, lambda *a: step(*a, pack_scale=1.0), "D \\*\\* -0.5"),
        (4, summing, "not a number"),
        (4, lambda *a: summing(*a, divide=False), "Divide by the sum"),
        (4, lambda *a: step(*a)[1], "two things"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(bidirectional, f"exercise_{number}")(answer)


def test_dots_are_not_started():
    answers = ((1, (..., ..., ..., ...)), (2, lambda p, w, M: ...), (3, lambda *a: ...))
    for number, answer in (*answers, (4, lambda *a: (..., ...))):
        with pytest.raises(NotStarted):
            getattr(bidirectional, f"exercise_{number}")(answer)
        assert not check(f"linear/bidirectional/{number}", answer).started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        bidirectional.exercise_5(lambda: None)


def test_the_figure_shows_what_the_chapter_says():
    """One token later Linformer points at the wrong place, and Luna does not; a sink holds no outputs."""
    at_home, moved = (squeezed(0, start, 4, "linformer", 8)[2][0] for start in (8, 9))
    assert at_home < 0.02 and moved == pytest.approx(2**0.5, abs=0.02)  # two columns apart
    assert max(squeezed(0, start, 4, "luna", 8)[2][0] for start in (8, 9, 12)) < 0.03
    assert squeezed(0, 20, 4, "luna", 8)[2][0] > 0.9  # the word that it packs by is gone
    map_error, output_error = squeezed(2, 0, 1, "best", 8)[2]
    assert map_error < 0.4 and output_error > 0.95
    assert squeezed(2, 1, 1, "best", 8)[2][0] > 0.8


def test_the_figure_maps_are_of_the_rank_it_says():
    for how in ("best", "linformer", "luna"):
        P, Q, errors = squeezed(1, 3, 5, how, 8)
        assert np.allclose(P.sum(1), 1) and np.linalg.matrix_rank(Q) <= 5
        assert errors[0] >= squeezed(1, 3, 5, "best", 8)[2][0]
    assert Squeeze().state["how"] == "linformer"
    with pytest.raises(ValueError, match="how is"):
        Squeeze(how="svd")
    with pytest.raises(ValueError, match="rows is 0, expected 1 to 16"):
        Squeeze(rows=0)
