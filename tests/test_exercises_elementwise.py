"""The checkers of linear/elementwise pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import elementwise
from effattn_lite.exercises.verdict import Wrong


def as_rwkv4(b):
    steps = np.diff(b[1:])
    return (steps[0], b[0] - b[1]) if np.allclose(steps, steps[0]) else None


def line_through_zero(b):
    steps = np.diff(b)
    return (steps[0], b[0] - b[1]) if np.allclose(steps, steps[0]) else None


def two_lags_only(b):
    return b[2] - b[1], b[0] - b[1]


def bonus_with_level(b):
    answer = as_rwkv4(b)
    return answer and (answer[0], b[0])


def backward(k, v, do):
    lse = np.logaddexp.accumulate(k)
    o, dk, dv = np.zeros((3, len(k)))
    o[0] = v[0]
    for t in range(1, len(k)):
        o[t] = np.exp(lse[t - 1] - lse[t]) * o[t - 1] + np.exp(k[t] - lse[t]) * v[t]
    alpha = beta = 0.0
    for j in range(len(k) - 1, -1, -1):
        fade = np.exp(lse[j] - lse[j + 1]) if j + 1 < len(k) else 0.0
        alpha, beta = fade * alpha + do[j], fade * beta + do[j] * o[j]
        own = np.exp(k[j] - lse[j])
        dv[j], dk[j] = own * alpha, own * (v[j] * alpha - beta)
    return dk, dv


def own_output_only(k, v, do):
    dk, dv = backward(k, v, do)
    return dv * v, dv


def unprotected(k, v, do):
    A, B = np.cumsum(np.exp(k) * v), np.cumsum(np.exp(k))
    right = lambda x: np.cumsum(x[::-1])[::-1]  # noqa: E731
    alpha, beta = right(do / B), right(do * A / B**2)
    return np.exp(k) * (v * alpha - beta), np.exp(k) * alpha


def token(name, value, names, V=4):
    own = np.eye(names)[name][:, None] * np.ones(V)
    if value is None:
        return (80 * (2 * own - 1)).ravel(), np.full(names * V, -60.0), np.zeros(names * V)
    return np.zeros(names * V), (60 * (own - 1)).ravel(), np.tile(value, names)


def taps_open(name, value, names, V=4):
    q, k, v = token(name, value, names)
    return 0 * q + 80, k, v


def loud_question(name, value, names, V=4):
    q, k, v = token(name, value, names)
    return q, k if value is not None else 0 * k, v


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (32 / 13, 3.6, 44 / 13)), (2, as_rwkv4), (3, backward), (4, token)],
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/elementwise/{number}", answer)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (28 / 12.5, 3.6, 44 / 13), "unfaded"),
        (1, (32 / 13, 51 / 15.5, 44 / 13), "bonus is not written"),
        (1, (32 / 13, 3.6, 17 / 5.5), "1/4, 1/2 and 1"),
        (1, 7, "three numbers"),
        (2, line_through_zero, "Lag 0 is free"),
        (2, two_lags_only, "expected None"),
        (2, bonus_with_level, "cancels"),
        (2, lambda b: None, "returned None"),
        (3, own_output_only, "do_t .v_j - o_t"),
        (3, unprotected, "infinite or not a number"),
        (3, lambda k, v, do: 1, "expected .dk, dv"),
        (4, taps_open, "taps are open"),
        (4, loud_question, "what does a question write"),
        (4, lambda *x: (1, 2, 3), "names times V"),
        (4, lambda *x: 7, "expected .q, k, v"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(elementwise, f"exercise_{number}")(answer)


@pytest.mark.parametrize(
    "number, answer",
    [
        (1, (...,) * 3),
        (2, lambda b: ...),
        (3, lambda k, v, do: None),
        (4, lambda name, value, names: (np.zeros(4 * names),) * 3),
    ],
)
def test_dots_are_not_started(number, answer):
    assert not check(f"linear/elementwise/{number}", answer).started


def test_the_gradient_of_the_checker_is_a_difference_quotient():
    rng, eps = np.random.default_rng(0), 1e-6
    k, v, do = rng.normal(size=(3, 6))

    def loss(k, v):
        w = np.exp(k)
        return do @ (np.cumsum(w * v) / np.cumsum(w))

    dk, dv = elementwise._gradient(k, v, do)
    for j, e in enumerate(eps * np.eye(6)):
        assert dk[j] == pytest.approx((loss(k + e, v) - loss(k - e, v)) / 2 / eps, abs=1e-6)
        assert dv[j] == pytest.approx((loss(k, v + e) - loss(k, v - e)) / 2 / eps, abs=1e-6)
    long = rng.normal(size=(3, 101))
    for a, b in zip(elementwise._gradient(*long), backward(*long), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        elementwise.exercise_5(lambda: None)
