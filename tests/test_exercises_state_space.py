"""The checkers of linear/state_space pass right answers, and say what is wrong with the usual mistakes."""

import math

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import state_space
from effattn_lite.exercises.verdict import Wrong

HAND = (math.exp(-2), 0, -1, 1 / 32, 13.86)


def gates(z, lam):
    step = np.logaddexp(0, z)
    return np.exp(-lam * step), -np.expm1(-lam * step) / lam, step


def overflowing(z, lam):
    step = np.log(1 + np.exp(z))
    return np.exp(-lam * step), -np.expm1(-lam * step) / lam, step


def cancelling(z, lam):
    keep, _, step = gates(z, lam)
    return keep, (1 - keep) / lam, step


def kernel(T, dt, A, B, C):
    half = dt / 2 * A
    powers = ((1 + half) / (1 - half)) ** np.arange(T)[:, None]
    return (powers @ (C * dt * B / (1 - half))).real


def convolution(x, dt, A, B, C, length=2):
    n = length * len(x)
    spectrum = np.fft.rfft(x, n) * np.fft.rfft(kernel(len(x), dt, A, B, C), n)
    return np.fft.irfft(spectrum, n)[: len(x)]


def circular(x, dt, A, B, C):
    return convolution(x, dt, A, B, C, length=1)


def exact_rule(x, dt, A, B, C):
    taps = ((np.exp(dt * A) ** np.arange(len(x))[:, None]) @ (C * dt * B)).real
    return np.convolve(x, taps)[: len(x)]


def euler_input(x, dt, A, B, C):
    return convolution(x, dt, A, B * (1 - dt / 2 * A), C)


def table(x, dt, A, B, C):
    lag = np.arange(len(x))[:, None] - np.arange(len(x))
    return np.where(lag >= 0, kernel(len(x), dt, A, B, C)[np.maximum(lag, 0)], 0) @ x


def clock(tokens):
    return np.select([tokens == 0, tokens == 1], [0.0, 1000.0], 0.1)


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, HAND), (2, gates), (3, convolution), (4, clock)],
    ids="hand gates long clock".split(),
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/state_space/{number}", answer)
    assert isinstance(getattr(state_space, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (*HAND[:2], 1, *HAND[3:]), "may be negative"),
        (1, (*HAND[:3], 1 / 64, 13.86), "largest step"),
        (1, HAND[:4], "five numbers"),
        (1, "nothing", "five"),
        (
            2,
            lambda z, lam: (gates(z, lam)[0], gates(z, lam)[1] * lam, gates(z, lam)[2]),
            "lam times too large",
        ),
        (2, overflowing, "digits|logaddexp"),
        (2, cancelling, "all digits"),
        (2, lambda z, lam: 1.0, "three numbers"),
        (3, circular, "circle"),
        (3, exact_rule, "bilinear rule is asked for"),
        (3, euler_input, "B-bar is"),
        (3, table, "T x T"),
        (3, lambda x, *rest: np.zeros(len(x) + 1), "shape"),
        (3, lambda x, *rest: convolution(x, *rest) + 0j, "complex"),
        (4, lambda tokens: np.full(len(tokens), 0.1), "no time"),
        (4, lambda tokens: np.where(tokens > 1, 0.1, 0.0), "too short"),
        (4, lambda tokens: np.select([tokens == 0, tokens == 1], [0.0, 1000.0], 0.2), "takes 0.1"),
        (4, lambda tokens: -np.ones(len(tokens)), "backwards"),
        (4, lambda tokens: np.ones(3), "shape"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(state_space, f"exercise_{number}")(answer)


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, (..., ..., ..., ..., ...)), (2, lambda z, lam: (..., ..., ...)), (3, lambda *parts: ...)],
)
def test_stubs_are_not_started(number, answer):
    verdict = check(f"linear/state_space/{number}", answer)
    assert not verdict and not verdict.started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        state_space.exercise_5(lambda: None)
