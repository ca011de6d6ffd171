"""Checkers of the exercises in book/linear/multi_pass.md. NumPy alone at import."""

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: a share of a mean, the control that fills a drawer, a gate, the size of a state.

    Args:
        answer: (share of word 40, nats, share of the GSA word, numbers of the state).
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        mean, nats, gate, numbers = (float(x) for x in answer)
    except (TypeError, ValueError):
        raise Wrong("give four numbers: (mean, nats, gate, numbers)") from None
    if abs(mean - 1 / 200) > 1e-5:
        hint = "; that is its share when it came" if abs(mean - 1 / 40) < 1e-5 else ""
        raise Wrong(f"mean: you gave {mean:g}{hint}; all 200 words weigh the same, whenever they came")
    if abs(nats - np.log(600)) > 0.01:
        said = "that fills half" if abs(nats - np.log(200)) < 0.01 else "weigh it against the rest"
        raise Wrong(f"nats: you gave {nats:g}; {said}: 3/4 to 1/4 means three times the weight of all 200")
    if abs(gate - 0.25 * 0.75**3) > 1e-4:
        hint = "it meets the gates of the three later words only" if abs(gate - 0.25 * 0.75**4) < 1e-4 else ""
        raise Wrong(f"gate: you gave {gate:g}; {hint or 'written at 1 - 3/4, then kept three times at 3/4'}")
    if numbers != 8192:
        hint = "; keys and values both lie in it" if numbers == 4096 else ""
        raise Wrong(f"numbers: you gave {numbers:g}{hint}; M (K + V)")
    return "1/200 whatever the order; ln 600 nats; 27/256; and as many numbers as a 64 x 128 state."


def exercise_2(control):
    """Proof and code: the control by which ABC is GSA.

    Args:
        control: function alpha [T, M] in (0, 1) -> s [T, M]; ABC runs it behind one empty token of control 0.
    """
    rng = np.random.default_rng(2)
    cases = {
        "six gates of 1/2": np.full((6, 1), 0.5),
        "one gate of 1/2": np.full((1, 1), 0.5),
        "nine tokens and three slots": rng.uniform(0.05, 0.95, size=(9, 3)),
        "400 gates of 0.1": np.full((400, 2), 0.1),
    }
    for what, alpha in cases.items():
        T = len(alpha)
        with np.errstate(all="ignore"):
            s = control(alpha.copy())
        if s is None or s is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        s = np.asarray(s, float)
        if s.shape != alpha.shape:
            raise Wrong(f"Given {what}, you returned shape {s.shape}, expected {alpha.shape}")
        if not np.isfinite(s).all():
            raise Wrong(f"Given {what}, a control is not a number: add logarithms, do not multiply gates")
        z = np.logaddexp.reduce(np.concatenate((0 * s[:1], s)), axis=0)
        G = np.cumsum(np.log(alpha), axis=0)
        want = np.log1p(-alpha) + G[-1] - G  # log of every token's share after the text
        must_be_close(s - z, want, what, hint=_control_hint(s, alpha), what="log of the shares", atol=1e-8)
    return (
        f"Four texts, the longest of {T} tokens with controls up to {s.max():.0f} nats: every share agrees."
    )


def _control_hint(s, alpha):
    G = np.cumsum(np.log(alpha), axis=0)
    if np.allclose(s, np.log1p(-alpha)):
        return "That is what a token writes when it comes; it must also outweigh all that was there before."
    if np.allclose(s, np.log1p(-alpha) + G):
        return "The sign of the sum: after gates that shut, a new token must weigh more, not less."
    if np.allclose(s, np.log1p(-alpha) - G + np.log(alpha)):
        return "The token's own gate belongs to the sum too: it shrinks what was there before it."
    return "Divide the share (1 - alpha_j) prod_{r > j} alpha_r by that of the empty token, prod_r alpha_r."


def exercise_3(merge):
    """Code: two memories of two stretches of a text become that of both.

    Args:
        merge: function (first, second) -> (K~ [K, M], V~ [M, V], z [M]); both are such triples.
    """
    rng = np.random.default_rng(3)
    K, M, V = 4, 3, 5
    cases = {
        "usual controls": rng.normal(size=(11, M)),
        "controls near 900": 900 + rng.normal(size=(11, M)),
        "controls near -900": -900 + rng.normal(size=(11, M)),
        "a second half 800 nats louder": np.repeat([0.0, 800.0], (6, 5))[:, None] + rng.normal(size=(11, M)),
    }
    for what, s in cases.items():
        k, v = rng.normal(size=(11, K)), rng.normal(size=(11, V))
        want = _memory(k, v, s)
        for cut in (6, 1):
            parts = _memory(k[:cut], v[:cut], s[:cut]), _memory(k[cut:], v[cut:], s[cut:])
            _check_merge(merge, parts, want, f"{what}, cut behind token {cut}")
    empty = np.zeros((K, M)), np.zeros((M, V)), np.full(M, -np.inf)
    _check_merge(merge, (empty, want), want, "an empty memory in front, z = -inf")
    return (
        "Nine pairs merge into the memory of the whole text, at any loudness; an empty one changes nothing."
    )


def _memory(k, v, s):
    z = np.logaddexp.reduce(s, axis=0)
    w = np.exp(s - z)
    return k.T @ w, w.T @ v, z


def _check_merge(merge, parts, want, given):
    with np.errstate(all="ignore"):
        got = merge(*(tuple(x.copy() for x in part) for part in parts))
    if got is None or (isinstance(got, tuple) and any(x is ... for x in got)):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise Wrong("`merge` must return three arrays: keys, values, z")
    for name, a, b in zip(("keys", "values", "z"), got, want, strict=True):
        try:
            a = np.asarray(a, float)
        except (TypeError, ValueError):
            raise Wrong(f"{name} is no array of numbers") from None
        if a.shape == b.shape and np.isnan(a).any():
            raise Wrong(f"Given {given}, {name} is not a number: take exp of differences to the new z only")
        hint = "Both are means: each counts by its share e^(z - new z), slot by slot."
        if name == "keys" and a.shape == b.shape and np.allclose(a, parts[0][0] + parts[1][0]):
            hint = "Means do not add up; sums of weights do."
        must_be_close(a, b, given, hint=hint, what=f"merge, {name},", atol=1e-8)


def exercise_4(rotate):
    """Code: gates by which gated slot attention is a sliding window.

    Args:
        rotate: function (T, M) -> (s [T, M], g [T, M]): what is written, and log decays.
    """
    rng = np.random.default_rng(4)
    for T, M in ((7, 3), (5, 1), (20, 4)):
        given = f"T = {T} and M = {M}"
        try:
            s, g = rotate(T, M)
        except (TypeError, ValueError):
            raise Wrong("`rotate` must return two arrays: s and g") from None
        if s is ... or g is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        s, g = np.asarray(s, float), np.asarray(g, float)
        if s.shape != (T, M) or g.shape != (T, M):
            raise Wrong(f"Given {given}, s and g have shapes {s.shape} and {g.shape}, expected {(T, M)}")
        if np.isnan(g).any() or g.max() > 0:
            raise Wrong(f"Given {given}, g is not a log decay: at most 0, and 0 keeps")
        q, k, v = rng.normal(size=(3, T, 6))
        for t, (o, full) in enumerate(zip(_slots(q, k, v, s, g), _window(q, k, v, M), strict=True)):
            if t >= M - 1:
                hint = _rotation_hint(s, g, T, M)
                must_be_close(o, full, f"{given}, token {t}", hint=hint, what="slot attention", atol=1e-7)
    return "Three windows agree, from the token on that fills the last slot."


def _slots(q, k, v, s, g):
    Sk, Sv, outputs = np.zeros((6, s.shape[1])), np.zeros((s.shape[1], 6)), []
    for t in range(len(q)):
        a = np.exp(g[t])
        Sk, Sv = Sk * a + np.outer(k[t], s[t]), a[:, None] * Sv + np.outer(s[t], v[t])
        p = np.exp(q[t] @ Sk - (q[t] @ Sk).max())
        outputs.append(p / p.sum() @ Sv)
    return outputs


def _window(q, k, v, W):
    for t in range(len(q)):
        x = k[max(0, t - W + 1) : t + 1] @ q[t]
        p = np.exp(x - x.max())
        yield p / p.sum() @ v[max(0, t - W + 1) : t + 1]


def _rotation_hint(s, g, T, M):
    turn = np.arange(T)[:, None] % M == np.arange(M)
    if not np.allclose(s, turn):
        return "Token t writes slot t mod M alone, at strength 1."
    if np.exp(g[turn]).max() > 1e-9:
        return "What was in the slot must go: e^g = 0 where a token writes."
    return "All other slots keep what they have: g = 0."


def exercise_5(kernel):
    """Kernel puzzle: read M slots for one query.

    Args:
        kernel: @triton.jit function (q_ptr, keys_ptr, values_ptr, o_ptr, scale, K, V, M, BK, BV, BM), grid
            (H,); the last three are tl.constexpr; all tensors contiguous float32.
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
    for H, K, V, M, size in ((1, 16, 16, 16, 1.0), (2, 12, 16, 10, 1.0), (3, 16, 20, 5, 60.0)):
        what = f"H = {H}, K = {K}, V = {V}, M = {M}" + (", scores up to some hundred" if size > 1 else "")
        q, keys, values = rng.normal(size=(H, K)), rng.normal(size=(H, K, M)), rng.normal(size=(H, M, V))
        x = np.einsum("hk,hkm->hm", q * size, keys) / 4
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        tensors = [torch.tensor(y, dtype=torch.float32, device=device) for y in (q * size, keys, values)]
        # a row behind the output must not be touched
        o = torch.full((H + 1, V), float("nan"), device=device)
        kernel[(H,)](*tensors, o, 0.25, K, V, M, BK=16, BV=32 if V > 16 else 16, BM=16)
        got, want = o.double().cpu().numpy(), np.einsum("hm,hmv->hv", p, values)
        if np.isnan(got[:H]).all() and not size > 1:
            raise Wrong(f"{what}: nothing was stored in o")
        if not np.isnan(got[H]).all():
            raise Wrong(f"{what}: you wrote behind the last head; mask lanes past V")
        if np.isnan(got[:H]).any():
            raise Wrong(f"{what}: o is not a number: subtract the largest score before exp")
        if np.abs(got[:H] - want).max() > 2e-4:
            raise Wrong(
                f"{what}: o is off by {np.abs(got[:H] - want).max():.2g}; {_read_hint(got[:H], x, values)}"
            )
    return "Three shapes agree, with slots that are no power of two, and scores that overflow a bare exp."


def _read_hint(got, x, values):
    def read(p):
        return np.einsum("hm,hmv->hv", p / p.sum(1, keepdims=True), values)

    M = x.shape[1]
    with np.errstate(all="ignore"):
        e = np.exp(x - x.max(1, keepdims=True))
        if np.allclose(got, read(np.exp(x * 4 - (x * 4).max(1, keepdims=True))), atol=1e-4):
            return "the scores are not scaled"
        top = np.maximum(x.max(1, keepdims=True), 0)
        padded = np.exp(x - top)
        total = padded.sum(1, keepdims=True) + (16 - M) * np.exp(-top)
        if np.allclose(got, np.einsum("hm,hmv->hv", padded / total, values), atol=1e-4):
            return "lanes past M score 0 and take part in the softmax: give them minus infinity"
        if np.allclose(got, np.einsum("hm,hmv->hv", e, values), atol=1e-4):
            return "divide by the sum of the weights"
    return "x = scale K^T q, p = softmax(x) over M, o = V^T p"
