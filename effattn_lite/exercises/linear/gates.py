"""Checkers of the exercises in book/linear/gates.md. NumPy alone at import."""

import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: the best gate of a head, the reach of GLA's gate, the pairs of one level.

    Args:
        answer: (share kept at a reset, unexplained share, tokens until 1 % is left, pairs in blocks of 16).
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        keep, share, tokens, pairs = (float(x) for x in answer)
    except (TypeError, ValueError):
        raise Wrong("give four numbers: (keep, share, tokens, pairs)") from None
    if abs(keep - 0.8) > 1e-3:
        raise Wrong(
            f"keep: you gave {keep:g}; a topic survives a reset of one in five with what probability?"
        )
    if abs(share - 4 / 9) > 1e-3:
        hint = "that is the limit for many topics; " if abs(share - 0.5) < 1e-3 else ""
        raise Wrong(f"share: you gave {share:g}; {hint}the head's gate leaves (R - 1) / (2 R - 1)")
    if tokens != 5:
        raise Wrong(
            f"tokens: you gave {tokens:g}; one token keeps sigma(-16)^(1/16), about 1/e, and n keep e^-n"
        )
    if pairs != 256:
        hints = {
            64: "; that is one block, and a chunk of 64 has four of 16 tokens",
            480: "; pairs within a half belong to smaller blocks",
            1024: "; a block of 16 has a reader in its second half of 8 and a writer in its first",
        }
        raise Wrong(f"pairs: you gave {pairs:g}{hints.get(pairs, '; count readers behind, writers before')}")
    return "Keep 4/5 and lose 4/9; five tokens of 1/e; four blocks of 8 x 8 pairs."


def exercise_2(weights):
    """Proof and code: the weights of one row of HGRN2.

    Args:
        weights: function f [T] -> [T + 1], the weight of S_0 first, then those of v_1, ..., v_T.
    """
    rng = np.random.default_rng(2)
    cases = {
        "f = [0.5]": np.array([0.5]),
        "f = [0.5, 0.25]": np.array([0.5, 0.25]),
        "seven random gates": rng.uniform(size=7),
        "gates of which one is 0": np.array([0.9, 0.0, 0.8, 0.3]),
        "three open gates": np.ones(3),
        "2,000 gates of 0.1": np.full(2000, 0.1),
    }
    for what, f in cases.items():
        want = np.zeros(len(f) + 1)
        want[0] = 1.0
        for n, share in enumerate(f):
            want *= share
            want[n + 1] = 1 - share
        with np.errstate(all="ignore"):
            got = weights(f.copy())
        must_be_close(got, want, what, hint=_weight_hint(got, want, f), what="weights")
    return "Six rows of gates, shut and open ones too: no weight is negative, and each row adds up to 1."


def _weight_hint(got, want, f):
    try:
        got = np.asarray(got, float)
        total = got.sum()
    except (TypeError, ValueError):
        return "return one array of T + 1 weights"
    if got.shape != want.shape:
        return "there is one weight more than gates: that of S_0, first"
    if np.isnan(got).any():
        return "a gate may be 0: multiply the gates behind n, do not divide by those before"
    if np.allclose(got[::-1], want):
        return "right, in the other order: S_0 comes first"
    if np.allclose(got[0], want[0]) and not np.isclose(total, 1):
        return (
            f"your weights add up to {total:.3g}; value n is written at 1 - f_n and meets the gates behind n"
        )
    return "value n meets the gates n+1, ..., T, and S_0 meets them all"


def exercise_3(dyadic):
    """Code: scores of a chunk by dyadic blocks.

    Args:
        dyadic: function (q [C, K], k [C, K], g [C, K]) -> A [C, C], 0 above the diagonal.
    """
    rng = np.random.default_rng(3)
    for C in (8, 1, 2, 32):
        for kind in ("usual", "open", "shut", "mixed"):
            q, k = rng.normal(size=(2, C, 5))
            g = {
                "usual": -rng.exponential(size=(C, 5)),
                "open": np.zeros((C, 5)),
                "shut": np.full((C, 5), -800.0),
                "mixed": rng.choice([0.0, -0.1, -800.0], size=(C, 5)),
            }[kind]
            with np.errstate(all="ignore"):
                got = dyadic(q.copy(), k.copy(), g.copy())
            given = f"{C} token{'s' * (C > 1)} with {kind} gates"
            want = _scores(q, k, g)
            must_be_close(got, want, given, hint=_score_hint(got, want, q, k, g), what="dyadic")
    q, k = rng.normal(size=(2, 64, 4))
    g = np.full((64, 4), -0.001)
    g[:4] = -60.0
    single = [x.astype(np.float32) for x in (q, k, g)]
    off = np.abs(np.asarray(dyadic(*single), float) - _scores(*(x.astype(float) for x in single))).max()
    if not off < 2e-5:
        raise Wrong(
            f"In float64 all is right, but in float32, after gates of -60, scores are off by {off:.0e}: you "
            "take the difference of two large sums. Sum gates from the block's middle, in both directions."
        )
    q, k, g = rng.normal(size=(3, 256, 64))
    tracemalloc.start()
    try:
        dyadic(q, k, -abs(g))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 8e6:
        raise Wrong(
            f"All numbers agree, but 256 tokens of 64 channels took {peak / 1e6:.0f} MB: that is a table "
            "[C, C, K]. Give each token its decay to the middle, and let one matrix product make the pairs"
        )
    return (
        "16 chunks agree, with gates of 0 and -800 nats side by side; float32 keeps its digits "
        f"(off by {off:.0e}); 256 tokens took {peak / 1e6:.1f} MB."
    )


def _scores(q, k, g):
    A = np.zeros((len(q), len(q)))
    for i in range(len(q)):
        faded = q[i].astype(float)
        for j in range(i, -1, -1):
            A[i, j] = faded @ k[j]
            faded = faded * np.exp(g[j])
    return A


def _score_hint(got, want, q, k, g):
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        return "return an array [C, C]"
    if got.shape != want.shape:
        return ""
    if not np.isfinite(got).all():
        return "An exponent was positive: from the middle both tokens decay, and neither grows."
    if not np.allclose(np.diag(got), np.diag(want)):
        return "A token with itself meets no gate: A_ii = q_i . k_i."
    if np.abs(np.triu(got, 1)).max(initial=0) > 0:
        return "There is something above the diagonal: readers come after their writers."
    late = [q[i] * np.exp(g[:i].sum(0)) for i in range(len(q))]
    if len(q) > 1 and np.isclose(got[1, 0], late[1] @ k[0]) and not np.isclose(got[1, 0], want[1, 0]):
        return "Between writer j and reader i lie the gates j+1, ..., i: the reader's own, not the writer's."
    if len(q) > 1 and np.isclose(got[1, 0], q[1] @ k[0]) and not np.isclose(got[1, 0], want[1, 0]):
        return "A reader meets its own gate too: start its sum at the middle, and include it."
    return (
        "Readers m..m+half-1 decay by the gates from m to their own, writers by those behind them up to m-1."
    )


def exercise_4(turn):
    """Code: GateLoop by gated linear attention of twice the channels.

    Args:
        turn: function (q, k, g, theta), [T, K] each -> (q2, k2, g2), real, [T, 2 K] each.
    """
    rng = np.random.default_rng(4)
    for T, K, V in ((1, 1, 1), (6, 1, 2), (9, 4, 3)):
        q, k, theta = rng.normal(size=(3, T, K))
        g, v = -rng.exponential(size=(T, K)), rng.normal(size=(T, V))
        given = f"T = {T} and K = {K}"
        try:
            parts = turn(*(x.copy() for x in (q, k, g, theta)))
            q2, k2, g2 = parts
        except (TypeError, ValueError):
            raise Wrong("`turn` must return three arrays: q2, k2, g2") from None
        if any(x is ... for x in (q2, k2, g2)):
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        for name, x in (("q2", q2), ("k2", k2), ("g2", g2)):
            if np.shape(x) != (T, 2 * K):
                raise Wrong(f"Given {given}, {name} has shape {np.shape(x)}, expected {(T, 2 * K)}")
            if np.iscomplexobj(x):
                raise Wrong(f"{name} is complex: a cosine and a sine take the place of e^(i theta)")
        if np.max(g2) > 0:
            raise Wrong(
                f"g2 has a gate of {np.max(g2):.3g} nats: log decays are at most 0; both halves fade as g"
            )
        S, P = np.zeros((K, V), complex), np.zeros((2 * K, V))
        want, got = np.zeros((2, T, V))
        for t in range(T):
            S = np.exp(g[t] + 1j * theta[t])[:, None] * S + np.outer(k[t], v[t])
            want[t] = q[t] @ S.real
            P = np.exp(g2[t])[:, None] * P + np.outer(k2[t], v[t])
            got[t] = q2[t] @ P
        must_be_close(
            got, want, given, hint=_turn_hint(q, k, g, theta, v, got), what="attention of what you return"
        )
    return "Three texts agree with the complex recurrence: the turn is in q and k, the fading in the gates."


def _turn_hint(q, k, g, theta, v, got):
    def outputs(angle_q, angle_k):
        G, o = np.cumsum(g, 0), np.zeros_like(v)
        for t in range(len(q)):
            for n in range(t + 1):
                swing = np.cos(angle_q[t] - angle_k[n])
                o[t] += (q[t] * k[n] * np.exp(G[t] - G[n]) * swing).sum() * v[n]
        return o

    if np.allclose(got, outputs(theta, theta)):
        return "Angles add up over the text: turn by the running sum of theta, not by theta."
    if np.allclose(got, outputs(np.cumsum(theta, 0), -np.cumsum(theta, 0))):
        return "You turn k backwards: the angle between two tokens is the difference of theirs."
    return "cos(a - b) = cos a cos b + sin a sin b, with a and b the running sums of theta."


def exercise_5(kernel):
    """Kernel puzzle: one token of decoding, in place.

    Args:
        kernel: @triton.jit function (q_ptr, k_ptr, v_ptr, g_ptr, S_ptr, o_ptr, K, V, BK, BV), grid
            (H, cdiv(V, BV)); the last two are tl.constexpr; all tensors contiguous float32.
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
    for H, K, V in ((1, 16, 16), (2, 16, 40), (3, 20, 24)):
        what, BK, BV = f"H = {H}, K = {K}, V = {V}", 16 if K == 16 else 32, 16
        q, k = rng.normal(size=(2, H, K))
        g, v, S = -rng.exponential(size=(H, K)), rng.normal(size=(H, V)), rng.normal(size=(H, K, V))
        tensors = [torch.tensor(x, dtype=torch.float32, device=device) for x in (q, k, v, g)]
        # what must not be touched: a row behind the state and the output
        state = torch.full((H + 1, K, V), 7.0, device=device)
        state[:H] = torch.tensor(S, device=device)
        o = torch.full((H + 1, V), float("nan"), device=device)
        kernel[(H, -(-V // BV))](*tensors, state, o, K, V, BK=BK, BV=BV)
        new = np.exp(g)[..., None] * S + k[..., None] * v[:, None]
        got_o, got_S = o.double().cpu().numpy(), state.double().cpu().numpy()
        if np.isnan(got_o[:H]).all():
            raise Wrong(f"{what}: nothing was stored in o")
        if not np.isnan(got_o[H]).all() or (got_S[H] != 7).any():
            raise Wrong(f"{what}: you wrote behind the last head; mask lanes past K and V")
        _close_state(what, got_S[:H], S, new, g, k, v)
        want = np.einsum("hk,hkv->hv", q, new)
        old = np.einsum("hk,hkv->hv", q, S)
        off = np.abs(got_o[:H] - want)
        if not off.max() < 1e-4 * np.abs(want).max():
            hint = "you read the old state" if np.allclose(got_o[:H], old, atol=1e-4) else "o = S^T q"
            raise Wrong(f"{what}: o is off by {np.nanmax(off):.2g}; {hint}, of the new state, summed over K")
    return "Three shapes agree, with K and V that are no powers of two; the state is replaced in place."


def _close_state(what, got, old, new, g, k, v):
    if np.abs(got - new).max() < 1e-4 * np.abs(new).max():
        return
    value_axis = old * 0
    if g.shape[1] == v.shape[1]:
        value_axis = np.exp(g)[:, None] * old + k[..., None] * v[:, None]
    hints = (
        (old, "the state was never stored"),
        (new - k[..., None] * v[:, None], "k v^T is missing"),
        (old + k[..., None] * v[:, None], "the gate is missing"),
        (g[..., None] * old + k[..., None] * v[:, None], "g is a logarithm: multiply by e^g"),
        (value_axis, "the gate belongs to the key axis: [BK, 1]"),
    )
    hint = next((words for x, words in hints if np.allclose(got, x, atol=1e-4)), "S <- Diag(e^g) S + k v^T")
    raise Wrong(f"{what}: the state is off by {np.abs(got - new).max():.2g}; {hint}")
