"""Checkers of the exercises in book/linear/random_features.md. NumPy alone at import."""

import math

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: features that a head of 64 needs, pairs of sine and cosine, and the widest ratio of weights.

    Args:
        answer: (logarithm of the number of features, pairs, largest ratio of two weights of RFA).
    """
    try:
        if any(part is ... or part is None for part in answer):
            raise NotStarted("replace the dots by your three numbers, then run the cell again.")
        log_features, pairs, ratio = (float(part) for part in answer)
    except (TypeError, ValueError):
        raise Wrong("give three numbers: (ln of the features, pairs, ratio)") from None
    if abs(log_features - 8) < 0.01:
        raise Wrong("a: you gave q . k; the spread depends on |q + k|^2, which is four times as much here")
    if abs(log_features - 256) < 0.01:
        raise Wrong("a: divide each vector by 64 ** 0.25 first: its squared length is then 8, not 64")
    must_be_close(
        log_features, 32, "entries of 1 and -1, K = 64, k = q", what="ln M", rtol=2e-3,
        hint="Set (e^(|q + k|^2) - 1) / M to 1.",
    )  # fmt: skip
    if pairs in (552, 553):
        raise Wrong(f"b: you gave {pairs:g}, which is the number of features; two of them share a frequency")
    if pairs != 277:
        raise Wrong(f"b: you gave {pairs:g}; |q - k|^2 is 2, and 2 sinh(1)^2 / M must not exceed 0.01")
    must_be_close(
        ratio, math.exp(8), "sigma = 2 and unit vectors", what="the ratio", rtol=2e-3,
        hint="Cosines of angles lie between -1 and 1, and scores are sigma^2 times that.",
    )  # fmt: skip
    return "e^32 = 7.9e13 features, 277 pairs, and weights from 1 to e^8 = 2,981."


def exercise_2(answer):
    """Proof and code: hyperbolic features, which are right on average, and their variance.

    Args:
        answer: (phi, spread): phi (x [..., K], omega [M, K]) -> [..., 2 M], for vectors that carry
            K ** -0.25 already; spread (q [K], k [K]) -> relative variance of one frequency's estimate.
    """
    try:
        phi, spread = answer
    except (TypeError, ValueError):
        raise Wrong("give two functions: (phi, spread)") from None
    rng = np.random.default_rng(2)
    for K, M in ((3, 1), (8, 5)):
        q, k, omega = rng.normal(size=(6, K)), rng.normal(size=(9, K)), rng.normal(size=(M, K))
        fq, fk = phi(q, omega), phi(k, omega)
        if fq is None or fq is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        fq, fk = np.asarray(fq, float), np.asarray(fk, float)
        if fq.shape != (6, 2 * M):
            raise Wrong(f"six vectors and {M} frequencies became {fq.shape}, expected (6, {2 * M})")
        if (fq <= 0).any() or (fk <= 0).any():
            raise Wrong("a feature is not positive: both halves are exponentials")
        square = ((q**2).sum(1)[:, None] + (k**2).sum(1)) / 2
        want = np.cosh(np.einsum("mk,ijk->ijm", omega, q[:, None] + k)).mean(-1) * np.exp(-square)
        ratio = (fq @ fk.T) / want
        hint = "Two exponentials share the weight of one: each half carries 1 / sqrt(2 M)."
        if np.ptp(ratio) > 1e-9 * abs(ratio).max():
            hint = "One half is e^(w . x), the other e^(-w . x), both times e^(-|x|^2 / 2)."
        must_be_close(fq @ fk.T, want, f"K={K}, M={M}", what="phi(q) . phi(k)", hint=hint)
    for q, k in ((rng.normal(size=4), rng.normal(size=4)), (np.ones(4) / 2, np.ones(4) / 2)):
        u = ((q + k) ** 2).sum()
        got = spread(q, k)
        if got is not None and got is not ... and abs(float(got) - math.expm1(u)) < 1e-9 * math.expm1(u):
            raise Wrong("spread: that is the variance of one plain positive feature; average over cosh now")
        must_be_close(
            got, math.cosh(u) - 1, f"|q + k|^2 = {u:.3g}", what="spread", rtol=1e-8,
            hint="E cosh(a)^2 = (1 + E cosh(2 a)) / 2, and E cosh(a) = e^(variance of a / 2).",
        )  # fmt: skip
    got = spread(np.ones(4), -np.ones(4))
    must_be_close(got, 0, "k = -q", what="spread", hint="w . (q + k) is 0 for every frequency.")
    return "Positive, right on average, and cosh(|q + k|^2) - 1: the mirror image of sine and cosine."


def exercise_3(attend):
    """Code: positive features from their exponents alone, one maximum a channel.

    Args:
        attend: function (a [T, M], b [T, M], v [T, V]): exponents of the features of queries and keys
            -> o [T, V], causal.
    """
    rng = np.random.default_rng(3)
    calm = (rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), rng.normal(size=(9, 3)))
    must_be_close(attend(*(x.copy() for x in calm)), _exact(*calm), "exponents around 0", rtol=1e-9)
    cases = {
        "exponents around 3,000": (0, 3000.0, 0),
        "exponents around -3,000": (0, -3000.0, 0),
        "keys whose exponents rise by 100 a token": (0, 0.0, 100),
        "keys whose exponents fall by 100 a token": (0, 0.0, -100),
    }
    for given, (_, level, slope) in cases.items():
        a, b, v = (x.copy() for x in calm)
        b += level + slope * np.arange(9)[:, None]
        _compare(
            attend, a, b, v, given, "Carry a maximum with the state, and rescale the state when it grows."
        )
    a, b, v = (x.copy() for x in calm)
    a += 2000
    _compare(attend, a, b, v, "queries around 2,000", "A query's largest exponent cancels: subtract it.")
    a, b, v = (x.copy() for x in calm)
    b += np.array([1500.0, 0, 0, 0])
    a -= np.array([3000.0, 0, 0, 0])
    hint = "One maximum for all channels wipes out three of four here: keep one for each channel."
    _compare(attend, a, b, v, "one channel 1,500 above the others, and queries that do not ask it", hint)
    return "Seven streams agree with exact arithmetic on logarithms, up to exponents of 3,000."


def exercise_4(draw):
    """Code: frequencies that are orthogonal in blocks, each of them Gaussian by itself.

    Args:
        draw: function (rng, M, K) -> [M, K].
    """
    rng = np.random.default_rng(4)
    for M, K in ((4, 4), (10, 4), (3, 8)):
        omega = draw(rng, M, K)
        if omega is None or omega is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        omega = np.asarray(omega, float)
        if omega.shape != (M, K):
            raise Wrong(f"M={M}, K={K}: shape {omega.shape}, expected ({M}, {K})")
        for start in range(0, M, K):
            block = omega[start : start + K]
            gram = block @ block.T
            if abs(gram - np.diag(np.diag(gram))).max() > 1e-9 * np.diag(gram).max():
                raise Wrong(f"M={M}, K={K}: rows {start} and on are not at right angles to each other")
    many = np.stack([np.asarray(draw(rng, 12, 8), float) for _ in range(2000)])
    square = (many**2).sum(-1)
    if square.std() < 1e-6 * square.mean():
        raise Wrong(
            f"every row has the squared length {square.mean():.3g}; a Gaussian vector's length varies: "
            "draw fresh lengths, or the estimate is biased"
        )
    if abs(square.mean() - 8) > 0.15 or abs(square.var() - 16) > 1.6:
        raise Wrong(
            f"squared lengths have mean {square.mean():.3g} and variance {square.var():.3g}, "
            "expected 8 and 16, those of 8 normal entries"
        )
    first = many[:, 0, 0]
    if (first < 0).all() or (first > 0).all():
        raise Wrong(
            "the first entry of the first frequency has the same sign in 2,000 draws: NumPy's qr chooses the "
            "signs of R. Multiply each column of Q by the sign of R's diagonal"
        )
    off = abs(many.mean(0)).max()
    if off > 5 / 2000**0.5:
        raise Wrong(
            f"an entry has the mean {off:.2g} over 2,000 draws, expected 0: directions are not uniform"
        )
    again = [np.asarray(draw(np.random.default_rng(s), 12, 8), float) for s in (1, 1)]
    if not np.array_equal(*again):
        raise Wrong("two draws from the same seed differ: use the generator that is handed in")
    return "Right angles in every block, and each row alone a Gaussian vector, by 2,000 draws."


def exercise_5(kernel):
    """Kernel puzzle: positive random features, a query's largest exponent taken off.

    Args:
        kernel: @triton.jit function (x_ptr, omega_ptr, phi_ptr, T, M, K, BT, QUERY); one program for BT rows;
            the last four are tl.constexpr; x [T, K], omega [M, K], phi [T, M], contiguous float32.
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
    for T, K, M, scale, query in ((32, 16, 16, 1, False), (40, 16, 64, 1, True), (9, 32, 16, 9, True)):
        x, omega = scale * rng.normal(size=(T, K)), rng.normal(size=(M, K))
        score = x @ omega.T / K**0.25 - (x**2).sum(1, keepdims=True) / (2 * K**0.5)
        want = np.exp(score - query * score.max(1, keepdims=True)) / M**0.5
        tx, tw = (torch.tensor(t, dtype=torch.float32, device=device) for t in (x, omega))
        phi = torch.full((T + 3, M), float("nan"), device=device)
        kernel[(triton.cdiv(T, 16),)](tx, tw, phi, T, M=M, K=K, BT=16, QUERY=query)
        got = phi.double().cpu().numpy()
        what = f"T={T}, K={K}, M={M}, QUERY={query}"
        if not np.isnan(got[T:]).all():
            raise Wrong(f"{what}: a row past T was stored; mask the store")
        got = got[:T]
        if np.isnan(got).all():
            raise Wrong(f"{what}: nothing was stored at phi_ptr")
        if np.isnan(got).any():
            raise Wrong(f"{what}: row {int(np.isnan(got).any(1).argmax())} is not whole")
        if query and scale > 1 and (got == 0).all():
            raise Wrong(f"{what}: long queries became 0; take off the largest exponent before exp")
        hints = {
            "each feature carries 1 / sqrt(M)": want * M**0.5,
            "the squared length of x carries 1 / (2 sqrt(K))": np.exp(x @ omega.T / K**0.25) / M**0.5,
        }
        near = (h for h, y in hints.items() if not query and np.allclose(got, y, rtol=1e-3))
        must_be_close(got, want, what, rtol=2e-5, atol=1e-6, hint=next(near, "x carries K ** -0.25") + ".")
    return "Three shapes agree: keys, queries with a ragged end, and queries far below float32's range."


def _compare(attend, a, b, v, given, hint):
    with np.errstate(all="ignore"):
        got = attend(a.copy(), b.copy(), v.copy())
    must_be_close(got, _exact(a, b, v), given, hint=hint, rtol=1e-8)


def _exact(a, b, v):
    # logarithms of the weights, the largest of a row taken off
    score = a[:, None] + b[None]  # [T, T, M]
    top = score.max(-1)
    log = top + np.log(np.exp(score - top[..., None]).sum(-1))
    log = np.where(np.tri(len(a), dtype=bool), log, -np.inf)
    w = np.exp(log - log.max(1, keepdims=True))
    return (w / w.sum(1, keepdims=True)) @ v
