"""Checkers of book/linear/elementwise.md."""

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answers):
    """By hand: three tokens of an RWKV-4 channel with e^g = 1/2 and e^u = 3.

    Args:
        answers: (o_2, o_3, o_3 with the survey's biases).
    """
    try:
        started = not any(x is ... or x is None for x in answers)
        second, third, survey = answers
    except (TypeError, ValueError):
        raise Wrong(f"your answer is {answers!r}, expected three numbers") from None
    if not started:
        raise NotStarted("replace the dots by your answers, then run the cell again.")
    given = "weights 1, 4, 1, values 8, 2, 5, e^g = 1/2 and e^u = 3"
    hint = "Token 2 reads token 1 unfaded, and itself with the weight 3 times 4."
    must_be_close(second, 32 / 13, given, what="o_2", hint=hint, rtol=5e-3)
    hint = "The bonus is not written: token 2 stands in the sums with the weight 4, token 1 with 1/2."
    must_be_close(third, 3.6, given, what="o_3", hint=hint, rtol=5e-3)
    hint = "There the weights are e^k times 1/4, 1/2 and 1."
    must_be_close(survey, 44 / 13, given, what="the survey's o_3", hint=hint, rtol=5e-3)
    return "32/13, 18/5 and 44/13: a bonus of 3 against the 2 that a line through lag 0 would give."


def exercise_2(as_rwkv4):
    """Proof and code: the biases that two sums can carry.

    Args:
        as_rwkv4: function (b [n + 1], biases by lag) -> (g, u), or None.
    """
    rng = np.random.default_rng(2)
    lags = np.arange(9.0)
    line = 1.5 - 0.4 * (lags - 1)
    free = line.copy()
    free[0] = -3
    cases = [
        (line, "a line through all lags"),
        (free, "a line from lag 1 on, lag 0 below it"),
        (np.full(9, 2.0), "a constant"),
        (np.array([1.0, 0.5, -0.5]), "three biases"),
        (np.where(lags < 4, 2.0, -2.0), "a window"),
        (-np.log1p(lags), "minus the logarithm of 1 + lag"),
        (np.where(lags == 8, 9.0, line), "a line with the last lag off it"),
    ]
    for b, words in cases:
        got = as_rwkv4(b.copy())
        if got is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        given, carried = f"{words}, b = {np.round(b, 2).tolist()}", np.ptp(np.diff(b[1:])) < 1e-9
        if got is None:
            if carried:
                raise Wrong(f"Given {given}, you returned None, but lags 1 and more lie on a line. {_FREE}")
            continue
        if not carried:
            raise Wrong(f"Given {given}, you returned {got!r}, expected None: the steps are not equal.")
        try:
            g, u = map(float, got)
        except (TypeError, ValueError):
            raise Wrong(f"Given {given}, you returned {got!r}, expected (g, u) or None") from None
        k, v = rng.normal(size=(2, len(b)))
        want, have = (_average(k, v, x) for x in (b, np.r_[u, g * np.arange(len(b) - 1)]))
        hint = f"Your (g, u) is ({g:.3g}, {u:.3g}); a constant on all biases cancels, so put b(1) to 0 first."
        must_be_close(have, want, given, what="the average with your g and u", hint=hint)
    return "Four biases are lines from lag 1 on and their averages agree; three are not, and you said so."


def exercise_3(backward):
    """Code: derivatives of a running average, in one sweep from the right.

    Args:
        backward: function (k [T], v [T], do [T]) -> (dk [T], dv [T]).
    """
    rng = np.random.default_rng(3)
    for T, loud in ((1, 1.0), (6, 1.0), (40, 1.0), (30, 300.0), (20_000, 2.0)):
        k, v, do = loud * rng.normal(size=T), rng.normal(size=T), rng.normal(size=T)
        given = f"{T} tokens with keys up to {np.abs(k).max():.0f}"
        with np.errstate(all="ignore"):
            got = backward(k.copy(), v.copy(), do.copy())
        if got is None or got is ...:
            raise NotStarted("return dk and dv, then run the cell again.")
        try:
            dk, dv = got
        except (TypeError, ValueError):
            raise Wrong(f"Given {given}, backward returned {type(got).__name__}, expected (dk, dv)") from None
        want_k, want_v = _gradient(k, v, do)
        hint = "dv_j sums e^(k_j - l_t) do_t over all t >= j: carry it from token j + 1 to token j."
        must_be_close(dv, want_v, given, what="dv", hint=hint, rtol=1e-7)
        hint = "dk_j is the same sum with do_t (v_j - o_t): carry the part with o_t beside it."
        must_be_close(dk, want_k, given, what="dk", hint=hint, rtol=1e-7)
    return "Five texts agree, of 20,000 tokens and with keys beyond 500: no exponent was positive."


def exercise_4(token):
    """Code: AFT-simple as a table with a row a name.

    Args:
        token: function (name, value [V] or None, names) -> (q, k, v), each [names V], V = 4.
    """
    rng, V = np.random.default_rng(4), 4
    for names, length in ((2, 6), (5, 30), (12, 200)):
        values, known, text = rng.normal(size=(names, V)), [], []
        for _ in range(length):
            if not known or rng.random() < 0.5:
                text.append((int(rng.integers(names)), True))
                known.append(text[-1][0])
            else:
                text.append((int(rng.choice(known)), False))
        A = B = np.zeros(names * V)
        m = np.full(names * V, -np.inf)
        for t, (name, tells) in enumerate(text):
            got = token(name, values[name].copy() if tells else None, names)
            try:
                q, k, v = (np.asarray(x, float) for x in got)
            except (TypeError, ValueError):
                raise Wrong(f"token returned {got!r}, expected (q, k, v)") from None
            for x, what in ((q, "q"), (k, "k"), (v, "v")):
                if x.shape != (names * V,):
                    raise Wrong(f"{what} has shape {x.shape}, expected ({names * V},) = names times V")
            if t == 0 and not (q.any() or k.any() or v.any()):
                raise NotStarted("fill in q, k and v, then run the cell again.")
            top = np.maximum(m, k)
            past, own = np.exp(m - top), np.exp(k - top)
            A, B, m = past * A + own * v, past * B + own, top
            if tells:
                continue
            with np.errstate(over="ignore"):
                o = (A / B / (1 + np.exp(-q))).reshape(names, V).sum(0)
            given = f"{names} names, token {t} asking for name {name}"
            hint = "Which rows does a telling write loudly, what does a question write, which taps are open?"
            must_be_close(o, values[name], given, what="the answer", hint=hint, rtol=1e-6)
    return "Three texts with up to 12 names: every question got its own name's value out of averages."


def exercise_5(kernel):
    """Kernel puzzle: the state at the end of every segment.

    Args:
        kernel: @triton.jit function (a_ptr, b_ptr, m_ptr, g_ptr, N, L, D), D a tl.constexpr; a, b, m [N, D]
            and g [D], contiguous float32, updated in place; one program.
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
    for N, L, D, loud in ((1, 4, 16, 1.0), (5, 4, 16, 1.0), (9, 16, 32, 200.0), (3, 100, 16, 20.0)):
        given = f"N = {N}, L = {L}, D = {D}, exponents up to some {3 * loud:.0f}"
        a, b, m = rng.normal(size=(N, D)), rng.uniform(1, L, (N, D)), loud * rng.normal(size=(N, D))
        g = -rng.uniform(0, 3, D)
        parts = [torch.tensor(x, dtype=torch.float32, device=device) for x in (a, b, m, g)]
        kernel[(1,)](*parts, N, L, D=D)
        got = [x.double().cpu().numpy() for x in parts[:3]]
        want = _joined(a, b, m, g * L)
        with np.errstate(all="ignore"):
            hint = "The earlier part fades by g L before it meets the segment; then take the larger exponent."
            must_be_close(got[0] / got[1], want[0] / want[1], given, what="a / b", hint=hint, rtol=1e-3)
            must_be_close(
                got[2] + np.log(got[1]),
                want[2] + np.log(want[1]),
                given,
                what="m + log b",
                hint=hint,
                rtol=1e-4,
            )
    return "Eighteen segments are joined, with exponents of some 600 and fadings of 300 nats."


_FREE = "Lag 0 is free: the token itself is not in the sums yet."


def _average(k, v, b):
    # of the last token, all biases by lag
    logs = k + b[::-1]
    w = np.exp(logs - logs.max())
    return (w @ v) / w.sum()


def _gradient(k, v, do):
    T, lse = len(k), np.logaddexp.accumulate(k)
    if T <= 100:
        P = np.exp(np.where(np.tri(T, dtype=bool), k - lse[:, None], -np.inf))
        o = P @ v
        return (P * do[:, None] * (v - o[:, None])).sum(0), P.T @ do
    fade = np.exp(lse[:-1] - lse[1:])
    o, right = np.zeros(T), np.zeros((2, T))
    o[0] = v[0]
    for t in range(1, T):
        o[t] = fade[t - 1] * o[t - 1] + np.exp(k[t] - lse[t]) * v[t]
    right[:, -1] = do[-1], do[-1] * o[-1]
    for j in range(T - 2, -1, -1):
        right[:, j] = fade[j] * right[:, j + 1] + (do[j], do[j] * o[j])
    own = np.exp(k - lse)
    return own * (v * right[0] - right[1]), own * right[0]


def _joined(a, b, m, fade):
    out, state = [], (a[0], b[0], m[0])
    for n in range(len(a)):
        if n:
            top = np.maximum(state[2] + fade, m[n])
            old, new = np.exp(state[2] + fade - top), np.exp(m[n] - top)
            state = old * state[0] + new * a[n], old * state[1] + new * b[n], top
        out.append(state)
    return [np.stack(x) for x in zip(*out, strict=True)]
