"""Checkers of book/linear/titans.md."""

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answers):
    """By hand: a shock of 1 with a momentum of 1/2 and a memory that keeps 0.9.

    Args:
        answers: the memory's answer one, two and three tokens later; its end if nothing is forgotten; and if
            the second token after the shock cuts the momentum as well.
    """
    try:
        started = not any(x is ... or x is None for x in answers)
        one, two, three, end, cut = answers
    except (TypeError, ValueError):
        raise Wrong(f"your answer is {answers!r}, expected five numbers") from None
    if not started:
        raise NotStarted("replace the dots by your answers, then run the cell again.")
    given = "a shock of 1, mu = 1/2 and keep = 0.9"
    hint = "P halves at each token; M is 0.9 of itself plus the new P."
    for got, want, name in (
        (one, 1.4, "one token"),
        (two, 1.51, "two tokens"),
        (three, 1.484, "three tokens"),
    ):
        must_be_close(got, want, given, what=f"the answer {name} later", hint=hint, rtol=2e-3)
    given = "a shock of 1 and mu = 1/2, nothing forgotten"
    must_be_close(
        end, 2, given, what="the end", hint="It is the sum of all P: 1 + 1/2 + 1/4 + ...", rtol=2e-3
    )
    hint = "A cut stops what would still come; what is in the memory stays."
    must_be_close(cut, 1.5, given, what="the end after the cut", hint=hint, rtol=2e-3)
    return "1, 1.4, 1.51, 1.484: it rises while P gives more than is forgotten, and a cut leaves 3/2 of 2."


def exercise_2(largest_rate):
    """Proof and code: the largest rate for a key that comes at every token.

    Args:
        largest_rate: function (keep, mu) -> the bound below which the memory settles.
    """
    for keep, mu in ((1.0, 0.0), (1.0, 0.9), (0.9, 0.0), (0.9, 0.5), (0.5, 0.98), (0.2, 0.2)):
        bound, given = largest_rate(keep, mu), f"keep = {keep}, mu = {mu}"
        if bound is None or bound is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        hint = "A tenth below your bound the largest eigenvalue has the size {:.3g}, a tenth above it {:.3g}."
        try:
            hint = hint.format(*(_growth(keep, mu, share * float(bound)) for share in (0.9, 1.1)))
        except (TypeError, ValueError):
            raise Wrong(f"Given {given}, you returned {bound!r}, expected a number") from None
        must_be_close(bound, (1 + keep) * (1 + mu), given, what="the bound", hint=hint)
    return "Six pairs of gates: just below (1 + keep)(1 + mu) the memory settles, just above it diverges."


def exercise_3(minibatch):
    """Code: one mini-batch whose errors are all taken at its start.

    Args:
        minibatch: function (q, k, v, *, keep, mu, eta, M, P) -> (o, M, P).
    """
    _compare(minibatch, every=None)
    return "Mini-batches of 1 to 24 tokens agree with the recurrence, a momentum of 0 among them."


def exercise_4(chunk):
    """Code: a chunk of tokens whose errors are each taken at the memory before it.

    Args:
        chunk: function (q, k, v, *, keep, mu, eta, M, P) -> (o, M, P).
    """
    _compare(chunk, every=1)
    return "Chunks of 1 to 24 tokens are exact for mini-batches of one: a triangular system was enough."


def exercise_5(kernel):
    """Kernel puzzle: the table L of forgetting and momentum.

    Args:
        kernel: @triton.jit function (keep_ptr, mu_ptr, l_ptr, n, N), N a tl.constexpr; keep and mu [H, n], L
            [H, n, n], contiguous float32; one program a head.
    """
    try:
        import torch
        import triton
    except ImportError as missing:
        raise Wrong(f"this puzzle needs {missing.name}: open it in Colab or Jupyter on Linux") from None
    if not hasattr(kernel, "run"):
        raise Wrong("decorate the kernel with @triton.jit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(5)
    for H, n in ((1, 1), (2, 16), (3, 13), (1, 32)):
        keep, mu = rng.uniform(0.5, 1, (H, n)), rng.uniform(0, 1, (H, n))
        mu[:, n // 2] = 0
        table = torch.full((H, n, n), float("nan"), device=device)
        gates = (torch.tensor(x, dtype=torch.float32, device=device) for x in (keep, mu))
        kernel[(H,)](*gates, table, n, N=triton.next_power_of_2(n))
        want = np.stack([_table(keep[h], mu[h]) for h in range(H)])
        hint = "Row t of U is mu_t times the row above, and 1 at t; L is keep_t times its row above plus U."
        given = f"H = {H}, n = {n}, with a momentum of 0 in the middle"
        must_be_close(table, want, given, what="the kernel", hint=hint, rtol=1e-5)
    return "Four tables agree with G U, every entry above the diagonal is 0, and n = 13 needs its mask."


def _growth(keep, mu, eta):
    # size of the largest eigenvalue of a token
    return np.abs(np.linalg.eigvals([[keep - eta, mu], [-eta, mu]])).max()


def _compare(answer, every):
    rng = np.random.default_rng(3)
    for n, K, V, words in ((1, 4, 3, ""), (5, 4, 3, ""), (24, 8, 5, ""), (12, 4, 4, ", one key throughout")):
        q, k, v = (rng.normal(size=(n, size)) for size in (K, K, V))
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        k = np.repeat(k[:1], n, axis=0) if words else k
        gates = {name: rng.uniform(low, 1, n) for name, low in (("keep", 0.7), ("mu", 0.0), ("eta", 0.0))}
        gates["mu"][n // 2] = 0
        state = {name: rng.normal(size=(K, V)) for name in "MP"}
        given = f"{n} tokens, K = {K}, V = {V}{words}, a momentum of 0 at token {n // 2}"
        kept = {name: x.copy() for name, x in state.items()}
        got = answer(q, k, v, **gates, **state)
        try:
            o, M, P = got
        except (TypeError, ValueError):
            raise Wrong(f"Given {given}, your function returned {got!r}, expected (o, M, P)") from None
        if any(not np.array_equal(kept[name], state[name]) for name in "MP"):
            raise Wrong(f"Given {given}, you changed the caller's M or P in place; make new arrays.")
        want = _recurrence(q, k, v, **gates, **state, every=every)
        hint = "The newest token is read too: L has 1 on its diagonal." if every is None else _SYSTEM
        must_be_close(o, want[0], given, what="the output", hint=hint)
        must_be_close(M, want[1], given, what="the memory", hint="It takes the last rows of gamma, a and L.")
        must_be_close(
            P, want[2], given, what="the momentum", hint="It takes the last row of U, and no decay."
        )


_SYSTEM = "Token i reads the memory of token i - 1: row i of the system takes row i - 1 of L, gamma and a."


def _recurrence(q, k, v, keep, mu, eta, M, P, every):
    start, o = M, []
    for t in range(len(q)):
        P = mu[t] * P + np.outer(k[t], eta[t] * (v[t] - k[t] @ start))
        M = keep[t] * M + P
        o.append(q[t] @ M)
        start = M if every else start
    return np.stack(o), M, P


def _table(keep, mu):
    n = len(keep)
    G, U = np.eye(n), np.eye(n)
    for t in range(1, n):
        G[t, :t], U[t, :t] = keep[t] * G[t - 1, :t], mu[t] * U[t - 1, :t]
    return G @ U
