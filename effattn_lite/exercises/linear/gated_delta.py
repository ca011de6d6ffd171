"""Checkers of the exercises in book/linear/gated_delta.md. NumPy alone at import."""

import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: three orders.

    Args:
        answer: what the key reads when the decay comes first, when the old answer is read before it, when it
            comes last; what the other key reads; the smallest eigenvalue of an RWKV-7 token.
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        got = [float(x) for x in answer]
    except (TypeError, ValueError):
        raise Wrong("give five numbers: three orders, the other key, the eigenvalue") from None
    if len(got) != 5:
        raise Wrong(f"give five numbers: three orders, the other key, the eigenvalue; you gave {len(got)}")
    asked = (
        ("decay, then correct", 3, "the gate leaves 2, and half of 4 - 2 is added"),
        ("correct by what was there before the decay", 1, "the gate leaves 2, but half of 4 - 6 is added"),
        ("correct, then decay", 5 / 3, "6 becomes 5 by the correction, and then fades"),
        ("the other key", 10 / 3, "it is at a right angle, so the gate alone reaches it"),
        (
            "the smallest eigenvalue",
            np.exp(-np.exp(-0.5)) - 1,
            "alpha - eta, with the smallest gate and the largest rate",
        ),
    )
    for x, (what, want, hint) in zip(got, asked, strict=True):
        if abs(x - want) > 6e-3:
            raise Wrong(f"{what}: you gave {x:g}; {hint}")
    return "3, 1 and 5/3; 10/3 under the other key in all three; and -0.4548."


def exercise_2(after):
    """Proof and code: what a key reads after n equal tokens.

    Args:
        after: function (n, alpha, beta, v, r0) -> what the key reads, a number.
    """
    count = 0
    for alpha, beta in ((0.9, 0.5), (1.0, 1.0), (1.0, 0.25), (0.5, 0.0), (1.0, 0.0), (0.97, 1.8), (1.0, 2.0)):
        for n in (0, 1, 2, 7):
            r = r0 = 3.0
            for _ in range(n):
                r = alpha * r
                r = r + beta * (-2.0 - r)
            given = f"n = {n}, alpha = {alpha:g}, beta = {beta:g}, v = -2, r0 = 3"
            with np.errstate(all="ignore"):
                got = after(n, alpha, beta, -2.0, r0)
            hint = "r_n = rate^n r0 + beta v (1 + rate + ... + rate^(n-1)) with rate = alpha (1 - beta)."
            if alpha * (1 - beta) == 1:
                hint = "Here nothing is written and nothing fades: the rate is 1, and 1 - rate is 0."
            must_be_close(got, r, given, hint=hint, what="after")
            count += 1
    return f"{count} cases agree with the loop, a rate of 1 and negative rates among them."


def exercise_3(chunkwise):
    """Code: the chunkwise gated delta rule of one head.

    Args:
        chunkwise: function (q [T, K], k [T, K], v [T, V], *, g [T], beta [T], initial_state [K, V],
            chunk_size) -> (o, S), scores not scaled.
    """
    rng = np.random.default_rng(3)
    kinds = ("some gates", "g = 0", "gates from 0 to 800 nats", "beta = 2", "one key at every token")
    count = 0
    for T, C in ((16, 4), (1, 4), (13, 4), (40, 16), (7, 1), (70, 64)):
        for kind in kinds:
            x = _draw(rng, T, kind)
            given = f"T = {T}, chunk_size = {C}, K = 5, V = 3, {kind}"
            S0, before = x.pop("initial_state"), None
            before = S0.copy()
            with np.errstate(all="ignore"):
                got = chunkwise(**{n: a.copy() for n, a in x.items()}, initial_state=S0, chunk_size=C)
            try:
                o, S = got
            except (TypeError, ValueError):
                raise Wrong(f"Given {given}, chunkwise must return the two results (o, S)") from None
            if not np.array_equal(S0, before):
                raise Wrong(f"{given}: you wrote into the caller's initial_state; make a new array")
            want_o, want_S = _recurrence(**x, S=S0)
            hint = _chunk_hint(np.asarray(o), x, S0, want_o, C, kind)
            must_be_close(o, want_o, given, hint=hint, what="o")
            hint = "S fades by the whole chunk's gates, and each write by the gates after it."
            must_be_close(S, want_S, given, hint=hint, what="the final state")
            count += 1
    x = _draw(rng, 2048, kinds[0])
    tracemalloc.start()
    try:
        chunkwise(**x, chunk_size=16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 8e6:
        raise Wrong(f"all numbers agree, but T = 2048 took {peak / 1e6:.0f} MB: solve one chunk at a time")
    return f"{count} cases agree with the recurrence, shut gates too; T = 2048 took {peak / 1e3:.0f} kB."


def exercise_4(translate):
    """Code: KDA's tensors as RWKV-7's.

    Args:
        translate: function (k [T, K], v [T, V], g [T, K], beta [T]) -> (k, v, g, a, b) for RWKV-7.
    """
    rng = np.random.default_rng(4)
    for T, low in ((1, -1.0), (9, -1.0), (9, -30.0)):
        k, v, g = rng.normal(size=(T, 5)), rng.normal(size=(T, 3)), rng.uniform(low, 0, size=(T, 5))
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        beta, S0, q = rng.uniform(0, 2, size=T), rng.normal(size=(5, 3)), rng.normal(size=(T, 5))
        want = _recurrence(q=q, k=k, v=v, g=g, beta=beta, S=S0)
        got = translate(k.copy(), v.copy(), g.copy(), beta.copy())
        try:
            made = [np.asarray(x, float) for x in got]
        except (TypeError, ValueError):
            raise Wrong("translate must return five arrays: k, v, g, a, b") from None
        given = f"T = {T}, K = 5, V = 3, gates down to {low:g} nats"
        shapes, right = [x.shape for x in made], [(T, 5), (T, 3), (T, 5), (T, 5), (T, 5)]
        if shapes != right:
            raise Wrong(f"Given {given}, k, v, g, a, b have shapes {shapes}, expected {right}")
        hint = _word_hint(made, k, g, beta)
        o, S = _goose(q, *made, S=S0)
        must_be_close(S, want[1], given, hint=hint, what="RWKV-7 on your tensors")
        must_be_close(o, want[0], given, hint=hint, what="RWKV-7 on your tensors")
    return "Three texts agree with KDA, gates of 30 nats and strengths up to 2 among them."


def exercise_5(kernel):
    """Kernel puzzle: one decoding step of the gated delta rule.

    Args:
        kernel: @triton.jit function (q, k, v, g, beta, s, o pointers, K, V, BV), the last three tl.constexpr.
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
    for H, K, V, BV in ((1, 16, 16, 16), (3, 32, 16, 16), (2, 16, 40, 16)):
        x = [rng.normal(size=(H, K)), rng.normal(size=(H, K)), rng.normal(size=(H, V))]
        x[1] /= np.linalg.norm(x[1], axis=1, keepdims=True)
        x += [rng.uniform(-2, 0, size=H), rng.uniform(0, 1, size=H), rng.normal(size=(H, K, V))]
        tensors = [torch.tensor(a, dtype=torch.float32, device=device) for a in x]
        o = torch.full((H, V), float("nan"), device=device)
        kernel[(H, -(-V // BV))](*tensors, o, K=K, V=V, BV=BV)
        given = f"H = {H}, K = {K}, V = {V}, BV = {BV}"
        got = tensors[5].double().cpu().numpy(), o.double().cpu().numpy()
        _judge_step(got, x, given)
    return "Three sizes agree, V = 40 in tiles of 16 among them, and every entry was written."


def _judge_step(got, x, given):
    S, o = got
    q, k, v, g, beta, S0 = x
    if np.isnan(o).any():
        raise Wrong(f"{given}: entries of o were never stored, or are NaN")
    steps = {}
    for order in ("first", "survey", "last"):
        alpha, b = np.exp(g)[:, None, None], beta[:, None]
        seen = alpha * S0 if order == "first" else S0
        write = np.einsum("hk,hv->hkv", k, b * (v - np.einsum("hk,hkv->hv", k, seen)))
        steps[order] = alpha * (S0 + write) if order == "last" else alpha * S0 + write
    close = lambda a, b: np.abs(a - b).max() <= 1e-5 * np.abs(b).max()  # noqa: E731
    if close(S, S0):
        raise Wrong(f"{given}: the state is as it was; store it back")
    if close(S, steps["survey"]):
        raise Wrong(f"{given}: the key reads the state before its decay; fade first")
    if close(S, steps["last"]):
        raise Wrong(f"{given}: what was just written fades too; fade first")
    hint = "Fade, then S += k (beta (v - S^T k))^T."
    must_be_close(S, steps["first"], given, hint=hint, rtol=1e-5, what="the state")
    want = np.einsum("hk,hkv->hv", q, steps["first"])
    must_be_close(o, want, given, hint="The query reads the new state.", rtol=1e-5, what="o")


def _draw(rng, T, kind):
    k = rng.normal(size=(T, 5))
    if kind.startswith("one key"):
        k = k[:1].repeat(T, 0)
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    g = rng.uniform(-1, 0, size=T)
    if kind == "g = 0":
        g = np.zeros(T)
    elif kind.startswith("gates from"):
        g = rng.choice([0.0, -1.0, -20.0, -800.0], size=T)
    beta = np.full(T, 2.0) if kind == "beta = 2" else rng.uniform(size=T)
    x = dict(q=rng.normal(size=(T, 5)), k=k, v=rng.normal(size=(T, 3)), g=g, beta=beta)
    return x | {"initial_state": rng.normal(size=(5, 3))}


def _recurrence(q, k, v, g, beta, S, *, fade=True):
    """The rule token by token; g [T] or [T, K]."""
    o = np.zeros_like(v)
    for t in range(len(k)):
        if fade:
            S = np.exp(g[t])[..., None] * S
        S = S + np.outer(k[t], beta[t] * (v[t] - k[t] @ S))
        o[t] = q[t] @ S
    return o, S


def _goose(q, k, v, g, a, b, *, S):
    o = np.zeros_like(v)
    for t in range(len(k)):
        S = np.exp(g[t])[:, None] * S + np.outer(b[t], a[t] @ S) + np.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o, S


def _chunk_hint(o, x, S0, want, C, kind):
    """What is wrong with the outputs, as far as one can tell."""
    if o.shape != want.shape:
        return "Return o with the shape of v."
    if kind.startswith("gates from") and not np.isfinite(o).all():
        return "A quotient or product of decays left the range: subtract logs first, and mask before exp."
    plain = _recurrence(**x, S=S0, fade=False)[0]
    if np.allclose(o[:C], plain[:C]) and not np.allclose(o[:C], want[:C]):
        return "This is the delta rule without a gate."
    if np.allclose(o[:1], want[:1]) and not np.allclose(o[:C], want[:C]):
        return "The first token is right: A_ij = beta_i e^(G_i - G_j) k_i . k_j for j < i."
    if np.allclose(o[:C], want[:C]):
        return "The first chunk is right: later ones must start from the state that it left."
    return "Delta solves (I + A) Delta = beta (V - xi K S); o = xi Q S + (D * Q K^T) Delta."


def _word_hint(made, k, g, beta):
    a, b = made[3], made[4]
    decayed = np.exp(g) * k
    if np.allclose(a, -k) and not np.allclose(k, decayed):
        return "RWKV-7 reads the state before it fades; KDA's key reads it after."
    if np.allclose(a, decayed) and np.allclose(b, beta[:, None] * k):
        return "This adds what the key found; it is to be taken away."
    if np.allclose(b, k) or np.allclose(b, -k):
        return "How strongly is the old value taken out?"
    return "Multiply (I - beta k k^T) Diag(e^g) out: a diagonal plus one outer product."
