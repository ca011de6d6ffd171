"""Checkers of the exercises in book/linear/bidirectional.md. NumPy alone at import."""

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close

_DOTS = "replace the dots by your answer, then run the cell again."


def exercise_1(answer):
    """By hand: the best map of a rank, a ratio of FLOPs, the numbers of E and F, a packed value.

    Args:
        answer: (relative error, ratio, numbers in E and F, output of Luna).
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted(_DOTS)
    try:
        error, ratio, numbers, output = (float(x) for x in answer)
    except (TypeError, ValueError):
        raise Wrong("give four numbers: (error, ratio, numbers, output)") from None
    if abs(error - 0.6) > 1e-4:
        hint = "; the errors of directions add up by their squares" if abs(error - 0.36) < 1e-4 else ""
        raise Wrong(f"error: you gave {error:g}{hint}; all 1,000 singular values are 1, and 360 are left out")
    if abs(ratio - 16) > 1e-6:
        hint = "; do not forget that keys and values are projected" if abs(ratio - 32) < 1e-6 else ""
        raise Wrong(
            f"ratio: you gave {ratio:g}{hint}; compare T (2K + 2V) with M (4K + 4V), a head and token"
        )
    if numbers != 33_554_432:
        hint = "; there are two matrices" if numbers == 16_777_216 else ""
        raise Wrong(f"numbers: you gave {numbers:g}{hint}; a row of 256 for every place, in E and in F")
    if abs(output - 7) > 1e-6:
        hint = (
            "; ln 3 is a score, not a weight"
            if abs(output - (4 + 8 * np.log(3)) / (1 + np.log(3))) < 0.1
            else ""
        )
        raise Wrong(
            f"output: you gave {output:g}{hint}; the weights are 1/4 and 3/4, and one row leaves no choice"
        )
    return "0.6, with 64 % of the rows kept; 16 times; 33.6 million numbers; and 7, whatever is asked."


def exercise_2(error):
    """Proof and code: the mean squared error of a random projection between a row of weights and a value.

    Args:
        error: function (p [T], w [T], M) -> expected squared error of p R R^T w, entries of R normal of
            variance 1/M.
    """
    rng = np.random.default_rng(2)
    p = np.exp(rng.normal(size=40))
    cases = {
        "a row that is spread evenly, w = 1": (np.full(50, 0.02), np.ones(50), 10),
        "a row that is one token": (np.eye(30)[3], rng.normal(size=30), 6),
        "weights and values that are orthogonal": (np.eye(30)[3], 1.0 - np.eye(30)[3], 5),
        "a usual row": (p / p.sum(), rng.normal(size=40) + 0.5, 12),
    }
    for given, (a, w, M) in cases.items():
        want = (a @ a * (w @ w) + (a @ w) ** 2) / M
        got = error(a.copy(), w.copy(), M)
        hint = "Take one column of R first; there are M of them, independent of each other."
        if got is not None and got is not ... and np.shape(got) == ():
            value = float(got)
            if np.isclose(value, a @ a * (w @ w) / M):
                hint = "That is the whole of it only where p . w = 0: the diagonal of R R^T fluctuates too."
            elif np.isclose(value, np.sqrt(want)):
                hint = "That is its square root."
            elif np.isclose(value, want * M):
                hint = "M independent columns are averaged."
        must_be_close(got, want, f"{given} and M = {M}", hint=hint, what="the error", rtol=1e-8)
    return (
        "Four rows agree: the error is that of |p| |w|, whatever p . w is, and it has no log of the length."
    )


def exercise_3(padded):
    """Code: a batch whose texts are not equally long.

    Args:
        padded: function (q, k, v, e, f, length) -> o [T, V] of one text, of which `length` tokens are real.
    """
    rng = np.random.default_rng(3)
    for T, length in ((9, 9), (9, 6), (12, 1)):
        q, k, v = (rng.normal(size=(T, n)) for n in (4, 4, 5))
        e, f = rng.normal(size=(2, T + 3, 3))
        k[length:], v[length:] = 50.0, -70.0
        want = _linformer(*(x[:length] for x in (q, k, v)), e, f)
        got = padded(*(x.copy() for x in (q, k, v, e, f)), length)
        if got is None or got is ...:
            raise NotStarted(_DOTS)
        if np.shape(got) != (T, 5):
            raise Wrong(
                f"with T = {T}, o has shape {np.shape(got)}, expected {(T, 5)}; rows of padding are ignored"
            )
        got, hint = np.asarray(got)[:length], "A padded token must add nothing to any row."
        if np.allclose(got, _linformer(q, k, v, e, f)[:length]):
            hint = "The padding is still in every row of the projected keys and values."
        elif length < T and np.allclose(got, _linformer(q, k * _real(T, length), v, e, f)[:length]):
            hint = "The values of the padding are still mixed in."
        elif length < T and np.allclose(got, _linformer(q, k, v * _real(T, length), e, f)[:length]):
            hint = "The keys of the padding are still mixed in."
        must_be_close(got, want, f"T = {T}, {length} of them real", hint=hint, what="the output", rtol=1e-8)
    return "Three batches agree with the text by itself, though the padding was loud."


def _real(T, length):
    return (np.arange(T) < length)[:, None].astype(float)


def _linformer(q, k, v, e, f):
    T = len(q)
    x = q @ (e[:T].T @ k).T / q.shape[1] ** 0.5
    p = np.exp(x - x.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) @ (f[:T].T @ v)


def exercise_4(step):
    """Code: Luna of every prefix, token by token.

    Args:
        step: function (state, q, k, v, c, p) -> (state, o [V]) of one token; state None is an empty text, c
            is [D], p [M, D].
    """
    rng = np.random.default_rng(4)
    K, V, D, M = 4, 5, 6, 3
    for what, loud in (("usual contents", 1.0), ("scores of some hundreds", 300.0)):
        p, state = rng.normal(size=(M, D)), None
        tokens = [rng.normal(size=n) for _ in range(8) for n in (K, K, V, D)]
        q, k, v, c = (np.array(tokens[i::4]) for i in range(4))
        for t in range(8):
            with np.errstate(all="ignore"):
                got = step(state, q[t].copy(), k[t].copy(), v[t].copy(), loud * c[t], p.copy())
            if got is None or got is ... or (isinstance(got, tuple) and any(x is ... for x in got)):
                raise NotStarted(_DOTS)
            if not isinstance(got, tuple) or len(got) != 2:
                raise Wrong("`step` must return two things: the new state and o")
            state, o = got
            given = f"{what}, token {t}"
            if np.isnan(np.asarray(o, float)).any():
                raise Wrong(f"Given {given}, o is not a number: carry the largest score, or a log of the sum")
            parts = q[: t + 1], k[: t + 1], v[: t + 1], loud * c[: t + 1]
            must_be_close(o, _luna(*parts, p), given, hint=_step_hint(o, *parts, p), what="o", atol=1e-8)
    return "Sixteen prefixes agree with Luna of the prefix: it is ABC, and its state does not grow."


def _luna(q, k, v, c, p, packed=None, scale=True):
    if packed is None:
        y = p @ c.T / c.shape[1] ** 0.5
        packed = np.exp(y - y.max(1, keepdims=True))
        packed /= packed.sum(1, keepdims=True)
    x = packed @ k @ q[-1] * (q.shape[1] ** -0.5 if scale else 1)
    w = np.exp(x - x.max())
    return w / w.sum() @ (packed @ v)


def _step_hint(o, q, k, v, c, p):
    with np.errstate(all="ignore"):
        y = p @ c.T / c.shape[1] ** 0.5
        if np.allclose(o, _luna(q, k, v, c, p, scale=False)):
            return "The scores of the rows want K ** -0.5."
        if np.allclose(o, _luna(q, k, v, c * c.shape[1] ** 0.5, p)):
            return "The packing scores want D ** -0.5."
        if np.allclose(o, _luna(q, k, v, c, p, packed=np.exp(y))):
            return "Divide by the sum of the packing weights so far, row by row."
    return "Row by row: old mean times its share, plus the newcomer times its own."


def exercise_5(kernel):
    """Kernel puzzle: project keys along the text.

    Args:
        kernel: @triton.jit function (e_ptr, k_ptr, o_ptr, T, M, K, BT, BM, BK), grid (ceil(M / BM),); the
            last three are tl.constexpr; tensors contiguous float32.
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
    for T, M, K in ((16, 16, 16), (64, 32, 16), (37, 20, 12)):
        e, k = rng.normal(size=(T, M)), rng.normal(size=(T, K))
        tensors = [torch.tensor(x, dtype=torch.float32, device=device) for x in (e, k)]
        # a row behind the output must not be touched
        o = torch.full((M + 1, K), float("nan"), device=device)
        kernel[(triton.cdiv(M, 16),)](*tensors, o, T, M, K, BT=16, BM=16, BK=16)
        got, want, what = o.double().cpu().numpy(), e.T @ k, f"T = {T}, M = {M}, K = {K}"
        if np.isnan(got[:M]).all():
            raise Wrong(f"{what}: nothing was stored in o")
        if not np.isnan(got[M]).all():
            raise Wrong(f"{what}: you wrote behind the last row; mask rows past M")
        if np.isnan(got[:M]).any():
            raise Wrong(
                f"{what}: some of o was not stored, or is not a number: one program has BM rows, mask K"
            )
        if np.abs(got[:M] - want).max() > 1e-3:
            hint = "the sum over the text in tiles of BT, with zeros past T"
            if np.allclose(got[:M], e[:16].T @ k[:16], atol=1e-3):
                hint = "only the first BT tokens are in it"
            raise Wrong(f"{what}: o is off by {np.abs(got[:M] - want).max():.2g}; {hint}")
    return "Three shapes agree, one with a text, rows and channels that fill no tile."
