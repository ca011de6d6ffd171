"""The checkers of linear/gated_delta pass right answers, and say what is wrong with the usual mistakes."""

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.exercises.linear import gated_delta
from effattn_lite.exercises.verdict import NotStarted, Wrong

HAND = (3, 1, 5 / 3, 10 / 3, -0.4548)


def after(n, alpha, beta, v, r0):
    rate = alpha * (1 - beta)
    if abs(1 - rate) < 1e-12:
        return r0
    return rate**n * r0 + beta * v * (1 - rate**n) / (1 - rate)


def divides(n, alpha, beta, v, r0):
    rate = np.float64(alpha * (1 - beta))
    return rate**n * r0 + beta * v * (1 - rate**n) / (1 - rate)


def chunkwise(q, k, v, *, g, beta, initial_state, chunk_size, gate=True, links=True, quotients=False):
    S, o = initial_state, np.zeros_like(v)
    for start in range(0, len(q), chunk_size):
        part = slice(start, start + chunk_size)
        qc, kc, b = q[part], k[part], beta[part, None]
        G = np.cumsum(g[part]) * gate
        i = np.arange(len(G))
        D = np.exp(np.where(i[:, None] >= i, G[:, None] - G, -np.inf))
        xi = np.exp(G)[:, None]
        if quotients:
            D = np.tril(xi / xi.T)
        A = np.tril(b * D * (kc @ kc.T), -1) * links
        delta = np.linalg.solve(np.eye(len(i)) + A, b * (v[part] - xi * (kc @ S)))
        o[part] = xi * (qc @ S) + (D * (qc @ kc.T)) @ delta
        S = xi[-1] * S + kc.T @ (D[-1][:, None] * delta)
    return o, S


def without_gate(*args, **kwargs):
    return chunkwise(*args, **kwargs, gate=False)


def without_links(*args, **kwargs):
    return chunkwise(*args, **kwargs, links=False)


def of_quotients(*args, **kwargs):
    return chunkwise(*args, **kwargs, quotients=True)


def one_system(q, k, v, *, g, beta, initial_state, chunk_size):
    return chunkwise(q, k, v, g=g, beta=beta, initial_state=initial_state, chunk_size=len(q))


def greedy(q, k, v, *, g, beta, initial_state, chunk_size):
    o, S = chunkwise(q, k, v, g=g, beta=beta, initial_state=initial_state, chunk_size=chunk_size)
    initial_state[:] = S
    return o, initial_state


def translate(k, v, g, beta):
    b = beta[:, None] * k
    return b, v, g, -np.exp(g) * k, b


def by_values(k, v, g, beta):
    return k, beta[:, None] * v, g, -np.exp(g) * k, beta[:, None] * k


def reads_early(k, v, g, beta):
    return beta[:, None] * k, v, g, -k, beta[:, None] * k


def adds(k, v, g, beta):
    return beta[:, None] * k, v, g, np.exp(g) * k, beta[:, None] * k


def erases_all(k, v, g, beta):
    return beta[:, None] * k, v, g, -np.exp(g) * k, k


@pytest.mark.parametrize(
    ("number", "answer"), [(1, HAND), (2, after), (3, chunkwise), (4, translate), (4, by_values)]
)
def test_right_answers_pass(number, answer):
    assert check(f"linear/gated_delta/{number}", answer)
    assert isinstance(getattr(gated_delta, f"exercise_{number}")(answer), str)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, (1, 3, 5 / 3, 10 / 3, -0.4548), "decay, then correct"),
        (1, (3, 1, 5 / 3, 10, -0.4548), "gate alone"),
        (1, (3, 1, 5 / 3, 10 / 3, -1), "largest rate"),
        (1, (3, 1), "five numbers"),
        (1, "3", "five numbers"),
        (2, divides, "nothing is written"),
        (2, lambda n, alpha, beta, v, r0: v, "r_n = rate"),
        (3, without_gate, "without a gate"),
        (3, without_links, "A_ij"),
        (3, of_quotients, "logs first"),
        (3, one_system, "one chunk at a time"),
        (3, greedy, "initial_state"),
        (3, lambda q, k, v, **_: v, "two results"),
        (4, reads_early, "before it fades"),
        (4, adds, "taken away"),
        (4, erases_all, "How strongly"),
        (4, lambda k, v, g, beta: (k, v), "shapes"),
    ],
)
def test_usual_mistakes_are_named(number, answer, words):
    with pytest.raises(Wrong, match=words):
        getattr(gated_delta, f"exercise_{number}")(answer)


def test_dots_are_no_answer():
    with pytest.raises(NotStarted):
        gated_delta.exercise_1((3, ..., 2, 2, 2))
    assert not check("linear/gated_delta/2", lambda *_: ...).started


def test_kernel_puzzle_wants_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(Wrong, match="triton.jit"):
        gated_delta.exercise_5(lambda: None)


@pytest.mark.parametrize(("order", "words"), [("survey", "before its decay"), ("last", "fades too")])
def test_kernel_puzzle_names_the_order(order, words):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(1, 4)), rng.normal(size=(1, 4)), rng.normal(size=(1, 3))
    g, beta, S = np.array([-1.0]), np.array([0.5]), rng.normal(size=(1, 4, 3))
    write = np.outer(k[0], beta * (v[0] - k[0] @ S[0]))
    wrong = np.exp(-1) * S + write if order == "survey" else np.exp(-1) * (S + write)
    with pytest.raises(Wrong, match=words):
        gated_delta._judge_step((wrong, v), (q, k, v, g, beta, S), "one head")
