"""The checkers of linear/multi_pass pass right answers, and say what is wrong with the usual mistakes."""

from itertools import product

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import multi_pass
from effattn_lite.exercises.verdict import NotStarted, Wrong
from effattn_lite.explore import Drawers
from effattn_lite.explore.drawers import BY_NAME, IN_ROTATION, TOKENS, read, right

RIGHT = (1 / 200, np.log(600), 27 / 256, 8192)


def control(alpha):
    return np.log1p(-alpha) - np.cumsum(np.log(alpha), axis=0)


def merge(first, second):
    z = np.logaddexp(first[2], second[2])
    a, b = np.exp(first[2] - z), np.exp(second[2] - z)
    return first[0] * a + second[0] * b, a[:, None] * first[1] + b[:, None] * second[1], z


def overflowing(first, second):
    a, b = np.exp(first[2]), np.exp(second[2])
    keys = (first[0] * a + second[0] * b) / (a + b)
    return keys, (a[:, None] * first[1] + b[:, None] * second[1]) / (a + b)[:, None], np.log(a + b)


def rotate(T, M, wiped=-800.0):
    turn = np.arange(T)[:, None] % M == np.arange(M)
    return turn.astype(float), np.where(turn, wiped, 0.0)


@pytest.mark.parametrize(("number", "answer"), [(1, RIGHT), (2, control), (3, merge), (4, rotate)])
def test_right_answers_pass(number, answer):
    assert check(f"linear/multi_pass/{number}", answer)
    assert isinstance(getattr(multi_pass, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (1 / 40, *RIGHT[1:]), "when it came"),
        (1, (RIGHT[0], np.log(200), *RIGHT[2:]), "fills half"),
        (1, (*RIGHT[:2], 0.25 * 0.75**4, 8192), "later words only"),
        (1, (*RIGHT[:3], 4096), "keys and values"),
        (1, (1, 2), "four numbers"),
        (2, lambda a: np.log1p(-a), "outweigh"),
        (2, lambda a: np.log1p(-a) + np.cumsum(np.log(a), 0), "sign"),
        (2, lambda a: control(a) + np.log(a), "own gate"),
        (2, lambda a: np.log((1 - a) / np.cumprod(a, 0)), "not a number"),
        (2, lambda a: control(a)[0], "shape"),
        (3, overflowing, "not a number"),
        (3, lambda a, b: (a[0] + b[0], a[1] + b[1], np.logaddexp(a[2], b[2])), "do not add up"),
        (
            3,
            lambda a, b: ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, np.logaddexp(a[2], b[2])),
            "counts by its share",
        ),
        (3, lambda a, b: a[0], "three arrays"),
        (4, lambda T, M: rotate(T, M, 0.0), "must go"),
        (4, lambda T, M: (np.ones((T, M)), rotate(T, M)[1]), "alone"),
        (4, lambda T, M: (rotate(T, M)[0], np.full((T, M), -800.0)), "keep what they have"),
        (4, lambda T, M: (rotate(T, M)[0], 1 - rotate(T, M)[0]), "at most 0"),
        (4, lambda T, M: rotate(M, T), "shapes"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(multi_pass, f"exercise_{number}")(answer)


def test_dots_are_not_started():
    answers = ((1, (..., ..., ..., ...)), (2, lambda a: ...), (3, lambda a, b: (..., ..., ...)))
    for number, answer in (*answers, (4, lambda T, M: (..., ...))):
        with pytest.raises(NotStarted):
            getattr(multi_pass, f"exercise_{number}")(answer)
        assert not check(f"linear/multi_pass/{number}", answer).started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        multi_pass.exercise_5(lambda: None)


def test_the_figure_fills_its_drawers():
    """Shares are those of the recurrences; with four drawers ABC answers three names at most, GSA four."""
    for rule, place in product(("abc", "gsa"), (BY_NAME, IN_ROTATION)):
        P, answers = read(rule, place)
        total = P.sum(0)
        assert np.allclose(total, 1) if rule == "abc" else (total < 1).all()
        assert np.allclose(answers.sum(1), 1, atol=1e-2)
    assert [right("gsa", place) for place in (BY_NAME, IN_ROTATION)] == [4, 4]
    assert [right("abc", place) for place in (BY_NAME, IN_ROTATION)] == [0, 0]
    outdated = (3, 3, 3, 3, 3, 1, 0, 3, 2, 3)
    assert right("abc", outdated) == 3
    draws = np.random.default_rng(0).integers(4, size=(500, len(TOKENS)))
    assert max(right("abc", place) for place in draws) <= 3
    assert max(right("gsa", place) for place in draws) <= 4
    assert Drawers().state["place"] == list(BY_NAME)
    with pytest.raises(ValueError, match="expected 10 drawers"):
        Drawers(place=(1, 2))
    with pytest.raises(ValueError, match="rule is"):
        Drawers(rule="lru")
