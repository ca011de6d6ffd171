"""The checkers of linear/titans pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import titans
from effattn_lite.exercises.verdict import Wrong


def tables(keep, mu):
    n = len(keep)
    G, U = np.eye(n), np.eye(n)
    for t in range(1, n):
        G[t, :t], U[t, :t] = keep[t] * G[t - 1, :t], mu[t] * U[t - 1, :t]
    return G, U, np.cumprod(keep)[:, None], np.cumprod(mu)[:, None]


def finish(q, k, W, G, U, gamma, past, M, P):
    L, a = G @ U, G @ past
    o = (q @ k.T * L) @ W + gamma * (q @ M) + a * (q @ P)
    M = gamma[-1] * M + a[-1] * P + k.T @ (L[-1][:, None] * W)
    return o, M, past[-1] * P + k.T @ (U[-1][:, None] * W)


def minibatch(q, k, v, *, keep, mu, eta, M, P):
    return finish(q, k, eta[:, None] * (v - k @ M), *tables(keep, mu), M, P)


def chunk(q, k, v, *, keep, mu, eta, M, P):
    G, U, gamma, past = tables(keep, mu)
    before = lambda x, first: np.concatenate([np.full_like(x[:1], first), x[:-1]])  # noqa: E731
    known = v - before(gamma, 1) * (k @ M) - before(G @ past, 0) * (k @ P)
    A = eta[:, None] * before(G @ U, 0) * (k @ k.T)
    W = np.linalg.solve(np.eye(len(q)) + A, eta[:, None] * known)
    return finish(q, k, W, G, U, gamma, past, M, P)


def without_old_momentum(q, k, v, *, keep, mu, eta, M, P):
    G, U, gamma, past = tables(keep, mu)
    return finish(q, k, eta[:, None] * (v - k @ M), G, U, gamma, 0 * past, M, P)


def decayed_momentum(q, k, v, *, keep, mu, eta, M, P):
    o, new, P1 = minibatch(q, k, v, keep=keep, mu=mu, eta=eta, M=M, P=P)
    return o, new, keep.prod() * P1


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (1, (1.4, 1.51, 1.484, 2, 1.5)),
        (2, lambda keep, mu: (1 + keep) * (1 + mu)),
        (3, minibatch),
        (4, chunk),
    ],
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/titans/{number}", answer)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (0.9, 0.81, 0.729, 2, 1.5), "P halves"),
        (1, (1.4, 1.51, 1.484, 1, 1.5), "sum of all P"),
        (1, (1.4, 1.51, 1.484, 2, 0), "stays"),
        (1, 7, "five numbers"),
        (2, lambda keep, mu: 2 * (1 + mu), "largest eigenvalue"),
        (2, lambda keep, mu: 2 * (1 - mu), "largest eigenvalue"),
        (2, lambda keep, mu: "two", "expected a number"),
        (3, chunk, "the output"),
        (3, without_old_momentum, "the output"),
        (3, decayed_momentum, "no decay"),
        (3, lambda *x, **y: 1, "expected .o, M, P"),
        (4, minibatch, "Token i reads"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(titans, f"exercise_{number}")(answer)


@pytest.mark.parametrize(
    "number, answer", [(1, (...,) * 5), (2, lambda keep, mu: ...), (3, lambda *x, **y: (..., ..., ...))]
)
def test_dots_are_not_started(number, answer):
    assert not check(f"linear/titans/{number}", answer).started


def test_writing_into_the_callers_state_is_refused():
    def greedy(q, k, v, **rest):
        o, M, P = minibatch(q, k, v, **rest)
        rest["M"][:] = M
        return o, M, P

    with pytest.raises(Wrong, match="in place"):
        titans.exercise_3(greedy)


def test_the_recurrence_of_the_checker_is_the_reference():
    from effattn_lite.reference.titans import recurrent
    from effattn_lite.testing import make_inputs

    x = make_inputs("titans", B=1, T=12, H=1, K=4, V=3)
    q, k, v, g, mu, eta = (x[name][0, :, 0] for name in ("q", "k", "v", "g", "mu", "eta"))
    M = P = np.zeros((4, 3))
    for every, size in ((None, 12), (1, 1)):
        o, (M1, P1, *_) = recurrent(**x, batch_size=size)
        got = titans._recurrence(q, k, v, keep=np.exp(g), mu=mu, eta=eta, M=M, P=P, every=every)
        for a, b in zip(got, (o[0, :, 0], M1[0, 0], P1[0, 0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        titans.exercise_5(lambda: None)
