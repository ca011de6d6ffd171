"""Checkers of the exercises in book/linear/shaped_features.md. NumPy alone at import."""

import math
import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: where a cosine has halved, what it leaves near by, and a product of two small softmaxes.

    Args:
        answer: (distance at half weight, share lost at distance 64, product of features).
    """
    try:
        if any(part is ... or part is None for part in answer):
            raise NotStarted("replace the dots by your three numbers, then run the cell again.")
        half, lost, product = (float(part) for part in answer)
    except (TypeError, ValueError):
        raise Wrong("give three numbers: (distance, share lost, product)") from None
    if abs(half - 450) < 1:
        raise Wrong("a: you gave half of the way; a cosine is a half at 60 degrees of its 90")
    must_be_close(half, 600, "max_length 900", what="the distance", rtol=2e-3, hint="cos 60° = 1/2.")
    must_be_close(
        lost, 1 - math.cos(math.pi / 32), "a distance of 64 in max_length 1,024", what="the share lost",
        rtol=0.03, hint="The angle is pi / 32 = 0.098, and 1 - cos x is about x^2 / 2.",
    )  # fmt: skip
    if abs(product - 9 / 16) < 1e-3:
        raise Wrong("c: that is the product of the two large features; the two small ones meet as well")
    must_be_close(
        product, 5 / 8, "u = ln(3) / 2 for query and key", what="the product", rtol=2e-3,
        hint="The features are 3/4 and 1/4.",
    )  # fmt: skip
    return "600 tokens, half a per cent, and 5/8 = (1 + 1/4) / 2."


def exercise_2(answer):
    """Proof and code: the product of two-sided features in closed form, and the one-sided map that holds it.

    Args:
        answer: (weight, lift): weight (a, b) -> product of softmax([a, -a]) and softmax([b, -b]);
            lift (W [M, K], b [M]) -> the pair (W', b') with exp(W' x + b') = [exp(u); exp(-u)], u = W x + b.
    """
    try:
        weight, lift = answer
    except (TypeError, ValueError):
        raise Wrong("give two functions: (weight, lift)") from None
    rng = np.random.default_rng(2)
    for a, b in [(0.0, 3.0), (0.7, -0.4), *rng.normal(size=(20, 2)), (40.0, -40.0), (900.0, 800.0)]:
        want = 0.5 * (1 + math.tanh(a) * math.tanh(b))
        with np.errstate(all="ignore"):
            try:
                got = weight(a, b)
            except OverflowError:
                got = math.nan
        hint = "Divide e^a and e^-a by their sum: it is 2 cosh a. And tanh never overflows."
        must_be_close(got, want, f"a = {a:.3g}, b = {b:.3g}", what="weight", rtol=1e-9, hint=hint)
    for K, M in ((3, 1), (5, 4)):
        W, b, x = rng.normal(size=(M, K)), rng.normal(size=M), rng.normal(size=(6, K))
        found = lift(W.copy(), b.copy())
        if found is None or found is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        W2, b2 = (np.asarray(part, float) for part in found)
        if W2.shape != (2 * M, K) or b2.shape != (2 * M,):
            raise Wrong(
                f"M={M}, K={K}: shapes {W2.shape} and {b2.shape}, expected {(2 * M, K)} and {(2 * M,)}"
            )
        u = x @ W.T + b
        want = np.exp(np.concatenate((u, -u), 1))
        hint = "The bias changes its sign with the rest of u."
        must_be_close(np.exp(x @ W2.T + b2), want, f"M={M}, K={K}", what="the lifted map", hint=hint)
    return "A tanh of each, never an overflow; and 2 M one-sided rows hold the two-sided map of M."


def exercise_3(step):
    """Code: cosFormer's step, with a state that turns.

    Args:
        step: function (q [K], k [K], v [V], theta, state (S [2, K, V], z [2, K])) -> (o [V], (S, z)): the
            cosine half first, then the sine half.
    """
    rng = np.random.default_rng(3)
    for T, K, V, reach in ((1, 3, 2, 10), (8, 4, 5, 8), (30, 6, 4, 60)):
        q, k, v = rng.normal(size=(T, K)), rng.normal(size=(T, K)), rng.normal(size=(T, V))
        theta = math.pi / (2 * reach)
        state, found = (np.zeros((2, K, V)), np.zeros((2, K))), []
        for t in range(T):
            with np.errstate(all="ignore"):
                out = step(q[t].copy(), k[t].copy(), v[t].copy(), theta, tuple(x.copy() for x in state))
            if out is None or out is ...:
                raise NotStarted("replace the dots by your answer, then run the cell again.")
            o, state = out
            found.append(np.asarray(o, float))
        found, given = np.array(found), f"T={T}, K={K}, max_length={reach}"
        hints = {
            "nothing turns yet: every weight is as large as if the key were new": _rows(q, k, v, 0.0),
            "the state turns the wrong way round, or the token is turned with the past": _rows(
                q, k, v, theta, shift=1
            ),
            "negative entries of queries and keys count as 0": _rows(q, k, v, theta, relu=False),
        }
        hint = next(
            (h + "." for h, x in hints.items() if _close(found, x)), "Turn first, then write, then read."
        )
        must_be_close(found, _rows(q, k, v, theta), given, rtol=1e-9, hint=hint)
        for part, rows in ((state[1], k), (state[0], k)):
            if np.shape(part)[:2] != (2, rows.shape[1]):
                raise Wrong(f"{given}: the state has shape {np.shape(part)}, expected (2, K, ...)")
    return "Three texts agree with the weights written out, and no position is counted."


def exercise_4(attend):
    """Code: softmax for the last W tokens, features for all before, one denominator.

    Args:
        attend: function (q [T, K], k [T, K], v [T, V], fq [T, M], fk [T, M], W) -> o [T, V].
    """
    rng = np.random.default_rng(4)

    def draw(T, K=4, M=3, V=5):
        shapes = ((T, K), (T, K), (T, V))
        return [*(rng.normal(size=s) for s in shapes), *(rng.gamma(1.0, size=(T, M)) for _ in range(2))]

    for T, W in ((1, 1), (9, 1), (14, 5), (6, 20)):
        x = draw(T)
        got, given = attend(*(a.copy() for a in x), W), f"T={T}, W={W}"
        hints = {
            "the window holds W tokens, the query's own included": _mixed(*x, W + 1),
            "two averages are not one: add the sums, then divide once": _halves(*x, W),
            "the tokens before the window are missing": _mixed(*x, W, far=0.0),
            "scores carry 1 / sqrt(K)": _mixed(*x, W, scale=1.0),
        }
        hint = next((h + "." for h, y in hints.items() if _close(got, y)), "")
        must_be_close(got, _mixed(*x, W), given, rtol=1e-9, hint=hint)
    x = draw(3000)
    tracemalloc.start()
    try:
        got = attend(*x, 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    must_be_close(got, _mixed(*x, 16), "T=3000, W=16", rtol=1e-8)
    if peak > 4e6:
        raise Wrong(
            f"all numbers agree, but T=3000 took {peak / 1e6:.0f} MB: keep S, z and W tokens, no table"
        )
    return f"Four shapes agree with the table of weights; T=3000 took {peak / 1e3:.0f} kB."


def exercise_5(kernel):
    """Kernel puzzle: features softmax([u; -u]) of u = W x + b, in one pass.

    Args:
        kernel: @triton.jit function (x_ptr, w_ptr, b_ptr, phi_ptr, T, M, K, BT); one program for BT rows; the
            last three are tl.constexpr; x [T, K], w [M, K], b [M], phi [T, 2 M], contiguous float32.
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
    for T, K, M, size in ((32, 16, 16, 1), (40, 16, 32, 1), (9, 32, 16, 60)):
        x, w, b = size * rng.normal(size=(T, K)), rng.normal(size=(M, K)), rng.normal(size=M)
        u = x @ w.T + b
        u = np.concatenate((u, -u), 1)
        e = np.exp(u - u.max(1, keepdims=True))
        want = e / e.sum(1, keepdims=True)
        tensors = [torch.tensor(t, dtype=torch.float32, device=device) for t in (x, w, b)]
        phi = torch.full((T + 3, 2 * M), float("nan"), device=device)
        kernel[(triton.cdiv(T, 16),)](*tensors, phi, T, M=M, K=K, BT=16)
        got = phi.double().cpu().numpy()
        what = f"T={T}, K={K}, M={M}" + (", u in the hundreds" if size > 1 else "")
        if not np.isnan(got[T:]).all():
            raise Wrong(f"{what}: a row past T was stored; mask the store")
        got = got[:T]
        if np.isnan(got).all():
            raise Wrong(f"{what}: nothing was stored at phi_ptr, or all of it is NaN")
        if np.isnan(got[:, M:]).all():
            raise Wrong(f"{what}: the second half, of -u, was not stored")
        if np.isnan(got).any():
            raise Wrong(
                f"{what}: row {int(np.isnan(got).any(1).argmax())} has a NaN; take off the largest |u|"
            )
        if np.allclose(got.sum(1), 2, rtol=1e-3):
            raise Wrong(f"{what}: each half adds up to 1; one softmax runs over both")
        must_be_close(got, want, what, rtol=3e-4, atol=1e-6)
    return "Three shapes agree: a ragged end, and exponents that float32 could not hold."


def _rows(q, k, v, theta, *, shift=0, relu=True):
    # the weights written out
    t = np.arange(len(q))
    q, k = (np.maximum(x, 0) if relu else x for x in (q, k))
    w = np.tril(q @ k.T * np.cos(theta * (t[:, None] - t + shift)))
    total = w.sum(1, keepdims=True)
    return w @ v / np.where(abs(total) > 1e-30, total, np.inf)


def _mixed(q, k, v, fq, fk, W, *, far=1.0, scale=None):
    t = np.arange(len(q))
    scale = q.shape[1] ** -0.5 if scale is None else scale
    lag = t[:, None] - t
    w = np.where(lag < W, np.exp(scale * q @ k.T), far * fq @ fk.T) * (lag >= 0)
    return w @ v / w.sum(1, keepdims=True)


def _halves(q, k, v, fq, fk, W):
    t = np.arange(len(q))
    lag = t[:, None] - t
    near = np.where((lag >= 0) & (lag < W), np.exp(q @ k.T / q.shape[1] ** 0.5), 0)
    old = np.where(lag >= W, fq @ fk.T, 0)
    total = old.sum(1, keepdims=True)
    return (near @ v / near.sum(1, keepdims=True) + old @ v / np.where(total > 0, total, np.inf)) / 2


def _close(got, want):
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        return False
    return got.shape == np.shape(want) and bool(np.allclose(got, want, rtol=1e-8, atol=1e-11))
