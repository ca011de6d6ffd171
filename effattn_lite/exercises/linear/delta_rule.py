"""Checkers of the exercises in book/linear/delta_rule.md. NumPy alone at import."""

import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: two keys at sixty degrees.

    Args:
        answer: what the adding memory answers to a and to b, what the delta rule answers to a and to b, and
            the further rounds until the answer to a is within 0.01 of 8.
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        got = [float(x) for x in answer]
    except (TypeError, ValueError):
        raise Wrong("give five numbers: adding a, adding b, delta a, delta b, rounds") from None
    if len(got) != 5:
        raise Wrong(f"give five numbers, two for each memory and the rounds; you gave {len(got)}")
    asked = (
        ("the adding memory under a", 9, "it reads its own 8 and half of b's 2"),
        ("the adding memory under b", 6, "it reads its own 2 and half of a's 8"),
        (
            "the delta rule under a",
            7,
            "b read 4 before its write, so it wrote 2 - 4, and a reads half of that",
        ),
        ("the delta rule under b", 2, "the last key written reads its value exactly when beta = 1"),
        ("rounds", 4, "each round multiplies the error at a by cos^2 60 degrees; it starts at 1"),
    )
    for x, (what, want, hint) in zip(got, asked, strict=True):
        if abs(x - want) > 1e-9:
            raise Wrong(f"{what}: you gave {x:g}; {hint}")
    return "9 and 6, 7 and 2; the error at a runs 1, 1/4, 1/16, 1/64, 1/256."


def exercise_2(join):
    """Proof and code: the W of two stretches that follow each other.

    Args:
        join: function (K1 [n1, K], W1 [n1, K], K2 [n2, K], W2 [n2, K]) -> W [n1 + n2, K], such that the
            product of the second stretch and the first is I - [K1; K2]^T W.
    """
    rng = np.random.default_rng(2)
    for sizes in ((1, 1), (4, 3), (7, 9)):
        (K1, P1, W1), (K2, P2, W2) = (_stretch(rng, n, 5) for n in sizes)
        given = f"stretches of {sizes[0]} and {sizes[1]} tokens, K = 5"
        W = join(K1, W1, K2, W2)
        keys = np.concatenate([K1, K2])
        if isinstance(W, np.ndarray) and W.shape == keys.shape:
            P = np.eye(5) - keys.T @ W
            if np.allclose(P, P1 @ P2) and not np.allclose(P, P2 @ P1):
                raise Wrong(f"{given}: this is P1 P2; the later stretch acts last, so it stands on the left")
            if np.allclose(W, np.concatenate([W1, W2])):
                raise Wrong(
                    f"{given}: the second stretch must not take out again what the first has taken out"
                )
        right = np.concatenate([W1, W2 - W2 @ K1.T @ W1])
        must_be_close(W, right, given, hint="Multiply (I - K2^T W2)(I - K1^T W1) out.", what="join")
    (K1, P1, W1), (K2, P2, W2), (K3, P3, W3) = (_stretch(rng, 3, 5) for _ in range(3))
    left = join(np.concatenate([K1, K2]), join(K1, W1, K2, W2), K3, W3)
    right = join(K1, W1, np.concatenate([K2, K3]), join(K2, W2, K3, W3))
    must_be_close(left, right, "three stretches", hint="Is it associative?", what="join from the left")
    return (
        "Three pairs of stretches give the product P2 P1, and three stretches may be joined from either end."
    )


def exercise_3(chunkwise):
    """Code: the chunkwise delta rule of one head.

    Args:
        chunkwise: function (q [T, K], k [T, K], v [T, V], *, beta [T], initial_state [K, V], chunk_size)
            -> (o, S), scores not scaled.
    """
    rng = np.random.default_rng(3)
    count = 0
    for T, C in ((16, 4), (1, 4), (3, 8), (13, 4), (40, 16), (7, 1), (70, 64)):
        for kind in ("beta in (0, 1)", "beta = 0", "beta = 1", "beta = 2", "one key at every token"):
            q, k, v = rng.normal(size=(T, 5)), rng.normal(size=(T, 5)), rng.normal(size=(T, 3))
            if kind.startswith("one"):
                k = k[:1].repeat(T, 0)
            k /= np.linalg.norm(k, axis=1, keepdims=True)
            beta = np.full(T, float(kind[-1])) if "= " in kind else rng.uniform(size=T)
            S0 = rng.normal(size=(5, 3))
            given = f"T = {T}, chunk_size = {C}, K = 5, V = 3, {kind}"
            before = S0.copy()
            got = chunkwise(q.copy(), k.copy(), v.copy(), beta=beta.copy(), initial_state=S0, chunk_size=C)
            try:
                o, S = got
            except (TypeError, ValueError):
                raise Wrong(f"Given {given}, chunkwise must return the two results (o, S)") from None
            if not np.array_equal(S0, before):
                raise Wrong(f"{given}: you wrote into the caller's initial_state; make a new array")
            want_o, want_S = _recurrence(q, k, v, beta, S0)
            hint = _chunk_hint(np.asarray(o), q, k, v, beta, S0, want_o, C)
            must_be_close(o, want_o, given, hint=hint, what="o")
            must_be_close(S, want_S, given, hint="The state gains K^T Delta.", what="the final state")
            count += 1
    T = 2048
    q, k, v = (rng.normal(size=(T, 4)) for _ in range(3))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    tracemalloc.start()
    try:
        chunkwise(q, k, v, beta=np.full(T, 0.5), initial_state=np.zeros((4, 4)), chunk_size=16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 8e6:
        raise Wrong(
            f"all numbers agree, but T = {T} took {peak / 1e6:.0f} MB: that is one system of T x T. "
            "Solve one chunk, [C, C], at a time"
        )
    return f"{count} cases agree with the recurrence, ragged chunks too; T = {T} took {peak / 1e3:.0f} kB."


def exercise_4(undo):
    """Code: the state before a write, from the state after it.

    Args:
        undo: function (S [K, V], k [K], v [V], beta) -> the state before, [K, V], or None where it is lost.
    """
    rng = np.random.default_rng(4)
    for length, beta in ((1.0, 0.3), (1.0, 2.0), (0.5, 1.0), (2.0, 0.1), (1.0, 0.0), (2.0, 1.0)):
        k, v, S = rng.normal(size=6), rng.normal(size=4), rng.normal(size=(6, 4))
        k *= length / np.linalg.norm(k)
        after = S + np.outer(k, beta * (v - k @ S))
        kept, given = after.copy(), f"a key of length {length:g} and beta = {beta:g}"
        got = undo(after, k, v, beta)
        if got is None:
            b = beta * length**2
            raise Wrong(f"Given {given}, undo gave None, but b = beta |k|^2 = {b:g}: nothing is lost")
        if not np.array_equal(after, kept):
            raise Wrong(f"Given {given}: your function changed the caller's state; make a new array")
        hint = "The key reads r' = (1 - b) r + b v afterwards, with b = beta |k|^2; solve for r."
        if isinstance(got, np.ndarray) and np.allclose(got, after - beta * np.outer(k, v)) and beta:
            hint = "You took the new value out, but the old one was erased too."
        must_be_close(got, S, given, hint=hint, what="undo")
    for length, beta in ((1.0, 1.0), (2.0, 0.25)):
        k, v, S = rng.normal(size=6), rng.normal(size=4), rng.normal(size=(6, 4))
        k *= length / np.linalg.norm(k)
        with np.errstate(all="ignore"):
            got = undo(S + np.outer(k, beta * (v - k @ S)), k, v, beta)
        if got is not None:
            raise Wrong(
                f"Given a key of length {length:g} and beta = {beta:g}, b = 1: the old answer is gone, so "
                "return None (compare with a tolerance: b is computed)"
            )
    return "Six writes are undone, and the two with b = 1 are known to be lost."


def exercise_5(kernel):
    """Kernel puzzle: (I + A)^-1 of strictly lower triangular matrices, one a program.

    Args:
        kernel: @triton.jit function (a_ptr, m_ptr, C), C a tl.constexpr; a and m [N, C, C], float32.
    """
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        raise Wrong(f"this puzzle needs {missing.name}: open it in Colab or Jupyter on Linux") from None
    if not hasattr(kernel, "run"):
        raise Wrong("decorate the kernel with @triton.jit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(5)
    for C in (16, 32, 64):
        k = rng.normal(size=(C, 8))
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        overlaps = k @ k.T
        cases = {
            "random keys, beta = 1": overlaps,
            "one key at every token, beta = 1": np.ones((C, C)),
            "one key at every token, beta = 2": np.full((C, C), 2.0),
        }
        A = np.tril(np.stack(list(cases.values())), -1).astype(np.float32)
        m = torch.full((len(cases), C, C), float("nan"), device=device)
        kernel[(len(cases),)](torch.tensor(A, device=device), m, C=C)
        for got, one, words in zip(m.double().cpu().numpy(), A, cases, strict=True):
            want = np.linalg.inv(np.eye(C) + one)
            what = f"C = {C}, {words}"
            if np.isnan(got).any():
                raise Wrong(f"{what}: entries of m were never stored, or are NaN")
            error = np.abs(got - want).max()
            if error > 1e-4 * np.abs(want).max():
                hint = (
                    "powers of A hold numbers that no longer cancel; join blocks instead"
                    if words.startswith("one") and np.abs(np.diagonal(got) - 1).max() < 1e6 and error > 1
                    else "two neighbours with inverses P and Q, joined by B, have -Q B P there"
                )
                raise Wrong(f"{what}: off by {error:.2g}; {hint}")
    return "Nine matrices, repeated keys and beta = 2 among them, are inverted to float32."


def _stretch(rng, n, K):
    """Keys [n, K], their product P [K, K] and the W [n, K] of it, token by token."""
    keys, beta = rng.normal(size=(n, K)), rng.uniform(0, 2, size=n)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    P, rows = np.eye(K), []
    for k, b in zip(keys, beta, strict=True):
        rows.append(b * k @ P)
        P = P - np.outer(k, rows[-1])
    return keys, P, np.array(rows)


def _recurrence(q, k, v, beta, S):
    o = np.zeros_like(v)
    for t in range(len(q)):
        S = S + np.outer(k[t], beta[t] * (v[t] - k[t] @ S))
        o[t] = q[t] @ S
    return o, S


def _chunk_hint(o, q, k, v, beta, S, want, C):
    """What is wrong with the outputs, as far as one can tell."""
    if o.shape != want.shape:
        return "Return o with the shape of v."
    if o.dtype.kind == "f" and np.allclose(o[:1], want[:1]) and not np.allclose(o[:C], want[:C]):
        added = q @ S + np.tril(q @ k.T) @ (beta[:, None] * (v - k @ S))
        if np.allclose(o[:C], added[:C]):
            return "A token must also see what the chunk's earlier tokens wrote: solve with I + A."
        return (
            "The first token is right: A_ij = beta_i k_i . k_j for j < i, and (I + A) Delta = beta (V - K S)."
        )
    if np.allclose(o[:C], want[:C]):
        return "The first chunk is right: later ones must start from the state that it left."
    return "o = Q S + tril(Q K^T) Delta, with the state before the chunk."
