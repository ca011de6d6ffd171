"""Checkers of book/linear/xlstm.md."""

import math

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close

KEEP, FLIP, RESET = range(3)


def exercise_1(answers):
    """By hand: three tokens with gates 0, ln 8, 0 and a forget gate of 1/2.

    Args:
        answers: (true normaliser, m_3, stored normaliser, share of the second token).
    """
    try:
        started = not any(x is ... or x is None for x in answers)
        true, m, stored, share = answers
    except (TypeError, ValueError):
        raise Wrong(f"your answer is {answers!r}, expected four numbers") from None
    if not started:
        raise NotStarted("replace the dots by your answers, then run the cell again.")
    what = "gates 0, ln 8, 0 and half kept a token"
    hint = "Token 1 is halved twice, token 2 once, token 3 not at all."
    must_be_close(true, 5.25, what, what="the true normaliser", hint=hint)
    hint = "The stabiliser fades too: log of 1/2 is added to it at every token."
    must_be_close(m, math.log(4), what, what="m_3", hint=hint, rtol=5e-3)
    must_be_close(stored, 5.25 / 4, what, what="the stored normaliser", hint="It is n times e^-m.", rtol=5e-3)
    must_be_close(share, 16 / 21, what, what="the share", hint="Its weight, faded, over n.", rtol=5e-3)
    return "n = 21/4 is stored as 21/16 beside m = ln 4, and the shout has 16/21 of the average either way."


def exercise_2(combine):
    """Proof and code: two stretches joined, each with its own stabiliser.

    Args:
        combine: function (first, second) -> (F, m, S), of triples (log decay, stabiliser, S times e^-m).
    """
    rng = np.random.default_rng(2)
    for loud in (1.0, 900.0):
        logf, gates = -rng.uniform(0.1, 2, size=7), loud * rng.normal(size=7)
        tokens = [(float(g), float(i), rng.normal(size=(3, 2))) for g, i in zip(logf, gates, strict=True)]
        F, m, S = _run(tokens)
        left = right = None
        with np.errstate(all="ignore"):
            for token in tokens:
                left = token if left is None else _triple(combine(left, token))
            for token in tokens[::-1]:
                right = token if right is None else _triple(combine(token, right))
        for (got_F, got_m, got_S), way in ((left, "left"), (right, "right")):
            given = f"seven tokens with gates up to {np.abs(gates).max():.0f}, joined from the {way}"
            must_be_close(got_F, F, given, what="the log decay", hint="Decays multiply: their logs add.")
            hint = "It is the larger of the first one's, faded by the second's decay, and the second's."
            must_be_close(got_m, m, given, what="the stabiliser", hint=hint)
            hint = "Bring both parts to the new m: the first also fades by the second's decay."
            must_be_close(got_S, S, given, what="the memory", hint=hint)
    return "Seven tokens give one state from the left and from the right, with gates near 1 and beyond 1,000."


def exercise_3(step):
    """Code: a step that no gate can break.

    Args:
        step: function (q [K], k [K], v [V], *, i, f, state) -> (o [V], (C, n, m)), scores not scaled.
    """
    rng = np.random.default_rng(3)
    for loud, words in ((1, "gates near 0"), (30, "gates up to some 60"), (800, "gates up to some 1,600")):
        state = np.zeros((4, 3)), np.zeros(4), 0.0
        for t in range(6):
            q, k, v = rng.normal(size=4), rng.normal(size=4), rng.normal(size=3)
            i, f = loud * rng.normal(), max(loud, 3) * rng.normal()
            given = f"{words}, token {t} with i = {i:.4g}, f = {f:.4g}"
            before = [np.copy(x) for x in state]
            with np.errstate(all="ignore"):
                got = step(q, k, v, i=i, f=f, state=state)
            if got is None:
                raise NotStarted("replace the dots by your step, then run the cell again.")
            if any(not np.array_equal(x, y) for x, y in zip(before, state, strict=True)):
                raise Wrong(f"Given {given}, you changed the caller's state in place; make new arrays.")
            try:
                o, (C, n, m) = got
            except (TypeError, ValueError):
                raise Wrong(f"Given {given}, step returned {got!r}, expected (o, (C, n, m)).") from None
            want, state = _step(q, k, v, i, f, state)
            hint = "m_t = max(log sigmoid(f) + m, i); log sigmoid(f) is -np.logaddexp(0, -f)."
            must_be_close(m, state[2], given, what="m", hint=hint)
            hint = "No exponent may be above 0: subtract the new m before you exponentiate."
            must_be_close(C, state[0], given, what="C", hint=hint)
            must_be_close(n, state[1], given, what="n", hint=hint)
            hint = "The bound of 1 becomes e^-m; where m is below -709 that is infinite, and o is 0."
            must_be_close(o, want, given, what="o", hint=hint)
    return "Eighteen steps agree, with gates of up to 1,600: no exponent is positive."


def exercise_4(tables):
    """Code: a cell that keeps, flips and resets.

    Args:
        tables: (z, i, f, r): three numbers each, in the order keep, flip, reset, and r_z.
    """
    try:
        *lists, r = tables
        if r is ... or any(x is ... for row in lists for x in row):
            raise NotStarted("replace the dots by numbers, then run the cell again.")
        table, r = np.asarray(lists, float), float(r)
    except (TypeError, ValueError):
        raise Wrong(
            f"your answer is {tables!r}, expected three numbers for z, i and f each, and r_z"
        ) from None
    if table.shape != (3, 3):
        raise Wrong(
            f"z, i and f have the shape {table.shape}, expected three numbers each: keep, flip, reset"
        )
    signs, names = {KEEP: lambda s: s, FLIP: lambda s: -s, RESET: lambda s: 1}, ("keep", "flip", "reset")
    for seed, share in enumerate(((0.4, 0.4, 0.2), (0.9, 0.1, 0.0), (0.0, 1.0, 0.0), (0.2, 0.2, 0.6))):
        text = np.random.default_rng(seed).choice(3, size=400, p=share)
        if seed == 1:
            text[:100] = KEEP
        cell, sign = (0.0, 0.0, 0.0, -math.inf), 1
        for t, token in enumerate(text):
            sign, before = signs[token](sign), cell[2]
            cell = _cell(*table[:, token], r, cell)
            if not cell[2] * sign > 0.5:
                last = ", ".join(names[x] for x in text[max(0, t - 3) : t + 1])
                raise Wrong(
                    f"After token {t} (the latest: {last}) h is {cell[2]:.3g}, expected near {sign}; "
                    f"before it was {before:.3g}. {_hint(token, t, before)}"
                )
    return "1,600 tokens of four texts: the cell keeps, flips and resets, and its sign is all it remembers."


def exercise_5(kernel):
    """Kernel puzzle: an average with loud weights.

    Args:
        kernel: @triton.jit function (v_ptr, i_ptr, f_ptr, o_ptr, T, V), V a tl.constexpr; v [T, V], gates i
            [T], log decays f [T], o [T, V], contiguous float32; one program.
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
    for T, V, loud in ((1, 16, 1.0), (20, 32, 1.0), (33, 16, 40.0), (24, 16, 400.0)):
        given = f"T = {T}, V = {V}, gates up to some {2 * loud:.0f}"
        v, i, f = rng.normal(size=(T, V)), loud * rng.normal(size=T), -rng.uniform(0, 2, size=T)
        tv, ti, tf = (torch.tensor(x, dtype=torch.float32, device=device) for x in (v, i, f))
        o = torch.full((T, V), float("nan"), device=device)
        kernel[(1,)](tv, ti, tf, o, T, V=V)
        F = np.cumsum(f)
        logs = np.where(np.tri(T, dtype=bool), F[:, None] - F + i, -np.inf)
        w = np.exp(logs - logs.max(1, keepdims=True))
        want = (w / w.sum(1, keepdims=True)) @ v
        hint = "Start m far below every gate, and let past and own weight be exponentials of numbers <= 0."
        must_be_close(o, want, given, what="the kernel", hint=hint, rtol=1e-3)
    return "Four texts agree with the sums, gates of 800 among them: the running maximum holds."


def _run(tokens):
    F, m, S = tokens[0]
    for g, i, kv in tokens[1:]:
        new = max(m + g, i)
        F, m, S = F + g, new, math.exp(m + g - new) * S + math.exp(i - new) * kv
    return F, m, S


def _step(q, k, v, i, f, state):
    C, n, m = state
    faded = m - np.logaddexp(0, -f)
    new = max(faded, i)
    past, own = math.exp(faded - new), math.exp(i - new)
    C, n = past * C + own * np.outer(k, v), past * n + own * k
    with np.errstate(over="ignore"):
        return (q @ C) / max(abs(q @ n), np.exp(-new)), (C, n, new)


def _cell(z, i, f, r, state):
    c, n, h, m = state
    faded = m - np.logaddexp(0, -f)
    m = max(faded, i)
    past, own = math.exp(faded - m), math.exp(i - m)
    c, n = past * c + own * math.tanh(z + r * h), past * n + own
    return c, n, c / n, m


def _hint(token, t, before):
    if t == 0:
        return "The first token finds h = 0, so its z alone decides."
    if token == KEEP:
        return "A keep that whispers is still heard where all before it were keeps: what does it write there?"
    if abs(before) < 0.5:
        return "A sign that has faded cannot be flipped."
    return "Two shouts of equal weight are averaged: something must be forgotten."


def _triple(answer):
    try:
        F, m, S = answer
    except (TypeError, ValueError):
        raise Wrong(f"combine returned {answer!r}, expected the three (F, m, S)") from None
    if any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    return F, m, S
