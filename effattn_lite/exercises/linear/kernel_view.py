"""Checkers of the exercises in book/linear/kernel_view.md. NumPy alone at import."""

import math
import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: three tokens, a cache as large as the state, and the features of a square.

    Args:
        answer: (o_3, tokens whose cache is as large as the state, features for 1 + x + x^2 / 2 with K = 16).
    """
    try:
        if any(part is ... or part is None for part in answer):
            raise NotStarted("replace the dots by your three numbers, then run the cell again.")
        o3, tokens, features = (float(part) for part in answer)
    except (TypeError, ValueError):
        raise Wrong("give three numbers: (o_3, tokens, features)") from None
    if abs(o3 - 13 / 3) < 0.005:
        raise Wrong("o_3: you gave the plain mean of the three values; weigh them by phi(k) = 1, 1/2 and 2")
    must_be_close(
        o3, 20 / 7, "features 1, 1/2, 2 and values 4, 8, 1", what="o_3", rtol=2e-3,
        hint="With one channel the query stands above and below the line, so it cancels.",
    )  # fmt: skip
    if tokens == 128:
        raise Wrong("tokens: you gave 128, which is S alone; the state has z as well")
    if tokens != 129:
        raise Wrong(
            f"tokens: you gave {tokens:g}; the state has K (V + 1) numbers of 4 bytes, "
            "the cache K + V numbers of 2 bytes for each token"
        )
    if features == 1 + 16 + 16**2:
        raise Wrong("features: you gave 273; x_1 x_2 and x_2 x_1 are one feature, if it is scaled right")
    if features != 153:
        raise Wrong(f"features: you gave {features:g}; count 1, the K channels, and the pairs i <= j")
    return "20/7 whatever the query, 129 tokens, and 1 + 16 + 136 features."


def exercise_2(most):
    """Proof and code: the largest weight that any query can put on each key.

    Args:
        most: function (phi [N, M], nonnegative features of N keys) -> [N].
    """
    rng = np.random.default_rng(2)
    for N, M in ((2, 1), (5, 3), (40, 16)):
        phi = rng.gamma(0.7, size=(N, M))
        given = f"{N} keys of {M} positive features"
        want = (phi / phi.sum(0)).max(1)
        got = most(phi.copy())
        if _close(got, (phi / phi.sum(0)).min(1)) and M > 1:
            raise Wrong(f"{given}: that is the smallest weight; take the channel that favours the key most")
        if _close(got, phi.max(1) / phi.sum(0).max()) and M > 1:
            raise Wrong(f"{given}: the largest feature over the largest sum mixes two channels")
        must_be_close(got, want, given, hint="A query that sees one channel alone reads phi_m(k) / z_m.")
        q = rng.gamma(0.1, size=(4000, M)) + 1e-12
        seen = (q @ phi.T / (q @ phi.sum(0))[:, None]).max(0)
        if (seen > np.asarray(got) * (1 + 1e-9)).any():
            raise Wrong(f"{given}: a query gave a key {seen.max():.3g}, more than your bound allows")
    phi = np.array([[2.0, 0, 0], [1, 0, 3], [0, 0, 1]])
    with np.errstate(all="ignore"):
        got = most(phi)
    hint = "The second channel is empty: z is 0 there, and no query gets an answer from it."
    must_be_close(got, [2 / 3, 3 / 4, 1 / 4], "three keys, and a channel that none of them has", hint=hint)
    return "The bound holds for 12,000 queries, is reached, and an empty channel does no harm."


def exercise_3(phi):
    """Code: features for 1 + x + x^2 / 2, no more than needed.

    Args:
        phi: function (x [..., K]) -> [..., M] with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(K).
    """
    rng = np.random.default_rng(3)
    for K in (1, 2, 5, 16):
        q, k = rng.normal(size=(7, K)), rng.normal(size=(9, K))
        fq, fk = phi(q), phi(k)
        if fq is None or fq is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        fq, fk = np.asarray(fq, float), np.asarray(fk, float)
        if fq.ndim != 2 or len(fq) != 7:
            raise Wrong(f"K={K}: seven vectors became {fq.shape}, expected (7, M)")
        s = q @ k.T / math.sqrt(K)
        hints = {
            "x^2 / 2 lacks its half": 1 + s + s * s,
            "scores carry 1 / sqrt(K), so each side carries K ** -0.25": 1 + s * K**0.5 + s * s * K / 2,
            "the constant feature 1 is missing": s + s * s / 2,
        }
        got = fq @ fk.T
        hint = next((h for h, x in hints.items() if _close(got, x)), "products x_i x_j with i < j come twice")
        must_be_close(got, 1 + s + s * s / 2, f"K={K}", what="phi(q) . phi(k)", hint=hint + ".")
        least = (K + 1) * (K + 2) // 2
        if fq.shape[1] > least:
            raise Wrong(
                f"K={K}: right, with {fq.shape[1]} features; {least} are enough: "
                "x_i x_j and x_j x_i can share one, times sqrt(2)"
            )
    x = rng.normal(size=(2, 3, 4, 5))
    if np.shape(phi(x)) != (2, 3, 4, 21):
        raise Wrong(
            f"x of shape {x.shape} became {np.shape(phi(x))}, expected (2, 3, 4, 21): work on the last axis"
        )
    return "Exact for K = 1, 2, 5 and 16, with (K + 1)(K + 2) / 2 features: 153 for K = 16."


def exercise_4(windowed):
    """Code: linear attention over the last W tokens, by adding one token and taking one away.

    Args:
        windowed: function (q [T, M], k [T, M], v [T, V], W), q and k positive features -> o [T, V].
    """
    rng = np.random.default_rng(4)
    for T, W in ((1, 1), (7, 1), (12, 4), (12, 12), (9, 30)):
        q, k, v = rng.gamma(1.0, size=(T, 3)), rng.gamma(1.0, size=(T, 3)), rng.normal(size=(T, 5))
        got = windowed(q.copy(), k.copy(), v.copy(), W)
        given, want = f"T={T}, W={W}", _window(q, k, v, W)
        hints = {
            "your window holds W + 1 tokens: token t - W leaves when t comes": _window(q, k, v, W + 1),
            "nothing leaves your window": _window(q, k, v, T),
            "the window takes its own token in: read after the write": _window(q, k, v, W, late=True),
        }
        hint = next((h + "." for h, x in hints.items() if _close(got, x)), "")
        must_be_close(got, want, given, hint=hint, rtol=1e-9)
    T, W = 4096, 1024
    q, k, v = rng.gamma(1.0, size=(T, 4)), rng.gamma(1.0, size=(T, 4)), rng.normal(size=(T, 4))
    tracemalloc.start()
    try:
        got = windowed(q, k, v, W)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    must_be_close(got, _window(q, k, v, W), f"T={T}, W={W}", rtol=1e-8)
    if peak > 6e6:
        raise Wrong(
            f"all numbers agree, but T={T} took {peak / 1e6:.0f} MB: keep one S and one z, no table of scores"
        )
    return f"Five windows agree with the sums written out; T={T} took {peak / 1e3:.0f} kB."


def exercise_5(kernel):
    """Kernel puzzle: causal linear attention of one head, with its denominator.

    Args:
        kernel: @triton.jit function (q_ptr, k_ptr, v_ptr, o_ptr, T, M, V, C), one program; the last three
            are tl.constexpr; q, k [T, M] nonnegative features, v, o [T, V], contiguous float32.
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
    for T, C, M, V, silent in (
        (32, 16, 16, 16, 0),
        (40, 16, 16, 32, 0),
        (9, 16, 32, 16, 0),
        (48, 16, 16, 16, 20),
    ):
        q, k, v = rng.gamma(1.0, size=(T, M)), rng.gamma(1.0, size=(T, M)), rng.normal(size=(T, V))
        k[:silent] = 0  # nothing to find: o is 0
        want = _window(q, k, v, T)
        tq, tk, tv = (torch.tensor(x, dtype=torch.float32, device=device) for x in (q, k, v))
        o = torch.full((T, V), float("nan"), device=device)
        kernel[(1,)](tq, tk, tv, o, T, M=M, V=V, C=C)
        got = o.double().cpu().numpy()
        what = f"T={T}, C={C}, M={M}, V={V}" + (
            f", the first {silent} keys without features" if silent else ""
        )
        if np.isnan(got).all():
            raise Wrong(f"{what}: nothing was stored at o_ptr")
        if np.isnan(got).any():
            at = int(np.isnan(got).any(1).argmax())
            raise Wrong(
                f"{what}: o of token {at} is NaN; "
                + ("0 / 0 must give 0" if silent else "store every row below T")
            )
        off = np.abs(got - want).max(1)
        if off.max() > 1e-4:
            at = int((off > 1e-4).argmax())
            hints = {
                "the denominator misses earlier chunks: carry z beside S": at >= C,
                "inside a chunk token i sees j <= i, above and below the line": at < C,
            }
            raise Wrong(
                f"{what}: token {at} is off by {off[at]:.2g}; " + next(h for h, yes in hints.items() if yes)
            )
    return "Four shapes agree: a ragged end, M != V, one short text, and keys without features."


def _window(q, k, v, W, *, late=False):
    # the sums written out; late: the token itself is not yet there
    T = len(q)
    o = np.zeros_like(v)
    for t in range(T):
        part = slice(max(0, t - W + 1 - late), t + 1 - late)
        w = k[part] @ q[t]
        o[t] = w @ v[part] / w.sum() if w.sum() > 0 else 0
    return o


def _close(got, want):
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        return False
    return got.shape == np.shape(want) and bool(np.allclose(got, want, rtol=1e-9, atol=1e-12))
