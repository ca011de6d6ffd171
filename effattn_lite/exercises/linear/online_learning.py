"""Checkers of the exercises in book/linear/online_learning.md. NumPy alone at import."""

import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: one token, four rules.

    Args:
        answer: what the key reads after adding, a gradient step, an implicit step and Longhorn's step, and
            what it reads after Longhorn was told the same token for ever.
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        got = [float(x) for x in answer]
    except (TypeError, ValueError):
        raise Wrong("give five numbers: adding, gradient, implicit, Longhorn, Longhorn for ever") from None
    if len(got) != 5:
        raise Wrong(f"give five numbers: four rules and the last one for ever; you gave {len(got)}")
    asked = (
        ("adding", 10, "it adds beta |k|^2 v to what the key reads"),
        ("the gradient step", -2, "b = beta |k|^2 is 2: the old answer's mirror image"),
        ("the implicit step", 10 / 3, "b = beta |k|^2 / (1 + beta |k|^2) of the way from 6 to 2"),
        (
            "Longhorn",
            16 / 3,
            "each entry keeps 1 - epsilon k_c^2 = 2/3; the write is that of the implicit step",
        ),
        ("Longhorn for ever", 4, "entry c stands still at v / k_c, and two of them are read"),
    )
    for x, (what, want, hint) in zip(got, asked, strict=True):
        if abs(x - want) > 6e-3:
            raise Wrong(f"{what}: you gave {x:g}; {hint}")
    return "10, −2, 10/3 and 16/3; and 4 in the end, twice the value."


def exercise_2(nearer):
    """Proof and code: by how much a step comes nearer to any state that answers right.

    Args:
        nearer: function (e [V], k [K], b) -> the fall of the squared distance, for the error e before the
            step and the effective strength b.
    """
    rng = np.random.default_rng(2)
    for b in (0.3, 1.0, 1.7, 2.0, 3.0, 0.0):
        k, S, right = rng.normal(size=5), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
        k *= rng.uniform(0.5, 3) / np.linalg.norm(k)
        v = k @ right
        e, size = v - k @ S, k @ k
        after = S + np.outer(k, b / size * e)
        want = ((S - right) ** 2).sum() - ((after - right) ** 2).sum()
        got = nearer(e, k, b)
        hint = "Write S_t - S* = (S_{t-1} - S*) + k delta^T and square it; k^T (S_{t-1} - S*) is -e^T."
        if np.ndim(got) == 0 and got is not None and got is not ... and np.isfinite(got):
            if np.isclose(got, -want) and want:
                hint = "The sign: the distance falls where 0 < b < 2, so the answer is positive there."
            elif np.isclose(got, want * size):
                hint = "delta is b e / |k|^2: the length of the key does not cancel."
        must_be_close(got, want, f"b = {b:g} and a key of length {size**0.5:.2f}", hint=hint, what="nearer")
    return "(2b - b^2) |e|^2 / |k|^2: positive for 0 < b < 2, so always for an implicit step."


def exercise_3(batch_step):
    """Code: the implicit step for n tokens at once.

    Args:
        batch_step: function (S [K, V], K [n, K], V [n, V], beta [n]) -> the state that minimises
            |X - S|^2 / 2 + sum beta_i |X^T k_i - v_i|^2 / 2.
    """
    rng = np.random.default_rng(3)
    for n, size, betas in (
        (1, 6, "random"),
        (4, 6, "random"),
        (9, 6, "random"),
        (5, 6, "two of 0"),
        (4, 6, "1e6"),
    ):
        keys, values, S = rng.normal(size=(n, size)), rng.normal(size=(n, 3)), rng.normal(size=(size, 3))
        beta = rng.uniform(0.2, 3, size=n)
        if betas == "two of 0":
            beta[1:3] = 0
        if betas == "1e6":
            beta[:] = 1e6
        want = np.linalg.solve(np.eye(size) + (keys.T * beta) @ keys, S + keys.T @ (beta[:, None] * values))
        kept, given = S.copy(), f"n = {n}, K = {size}, strengths: {betas}"
        with np.errstate(all="ignore"):
            got = batch_step(S, keys, values, beta)
        if not np.array_equal(S, kept):
            raise Wrong(f"Given {given}: your function changed the caller's state; make a new array")
        must_be_close(got, want, given, hint=_batch_hint(got, S, keys, values, beta, want), what="batch_step")
    keys, S = rng.normal(size=(3, 1200)), np.zeros((1200, 1))
    tracemalloc.start()
    try:
        batch_step(S, keys, rng.normal(size=(3, 1)), np.ones(3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 4e6:
        raise Wrong(
            f"all numbers agree, but three tokens with K = 1200 took {peak / 1e6:.0f} MB: a matrix of "
            "K x K. Solve for what is written, n x n"
        )
    return f"five batches agree with the minimum, n > K and beta = 0 too; K = 1200 took {peak / 1e3:.0f} kB."


def exercise_4(has_loss):
    """Proof and code: whether a step can be a gradient step of any loss.

    Args:
        has_loss: function (step, K, V) -> bool, for an affine function step: S [K, V] -> S [K, V].
    """
    rng = np.random.default_rng(4)
    for name, step, want, hint in _steps(rng, 4, 3):
        got = has_loss(step, 4, 3)
        if got is None or got is ...:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        if not isinstance(got, (bool, np.bool_)):
            raise Wrong(f"{name}: return True or False, not a {type(got).__name__}")
        if bool(got) != want:
            said = "is a gradient step" if want else "is no gradient step of any loss"
            raise Wrong(f"{name} {said}, and you say {bool(got)}: {hint}")
    return "seven steps judged right: four follow a loss, three follow none."


def exercise_5(kernel):
    """Kernel puzzle: the exact implicit step, token by token, a head a program.

    Args:
        kernel: @triton.jit function (q_ptr, k_ptr, v_ptr, beta_ptr, o_ptr, T, K, V), K and V tl.constexpr;
            q and k [N, T, K], v, beta and o [N, T, V], float32.
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
    for T, K, V, top in ((1, 16, 16, 1), (7, 16, 32, 1), (9, 32, 16, 1e4)):
        q, k = rng.normal(size=(2, 3, T, K)).astype(np.float32)
        v, beta = rng.normal(size=(3, T, V)).astype(np.float32), rng.uniform(0, top, size=(3, T, V))
        beta = beta.astype(np.float32)
        o = torch.full((3, T, V), float("nan"), device=device)
        kernel[(3,)](*(torch.tensor(x, device=device) for x in (q, k, v, beta)), o, T, K=K, V=V)
        got, given = o.double().cpu().numpy(), f"T = {T}, K = {K}, V = {V}, beta up to {top:g}"
        if np.isnan(got).any():
            raise Wrong(f"{given}: entries of o were never stored, or are NaN")
        want = _implicit(*(x.astype(np.float64) for x in (q, k, v, beta)))
        hint = (
            "epsilon = beta / (1 + beta |k|^2), and the state gets k (epsilon (v - S^T k))^T before q reads."
        )
        if T > 1 and np.allclose(got[:, 0], want[:, 0], atol=1e-4):
            hint = (
                "The first token is right: is the old answer of the key taken off, and the state carried on?"
            )
        elif np.allclose(got, _implicit(q, k, v, beta, diagonal=True), atol=1e-4):
            hint = "This is Longhorn's own step, which drops what the channels share; keep all of k k^T."
        must_be_close(got, want, given, hint=hint, rtol=1e-4, atol=1e-5, what="the kernel")
    return "three sizes agree with the exact step, strengths of 10,000 too."


def _batch_hint(got, S, keys, values, beta, want):
    """What is wrong with the step of a mini-batch, as far as one can tell."""
    if not isinstance(got, np.ndarray) or got.shape != want.shape:
        return "Return the new state, [K, V]."
    if not np.isfinite(got).all():
        return "A token with beta = 0 is ignored: do not divide by beta."
    error = beta[:, None] * (values - keys @ S)
    if np.allclose(got, S + keys.T @ error):
        return "That is a gradient step: the errors must be those after the step."
    lower = np.tril(beta[:, None] * (keys @ keys.T))
    if np.allclose(got, S + keys.T @ np.linalg.solve(np.eye(len(beta)) + lower, error)):
        return "That is one implicit step after the other; here all tokens are told at once: no triangle."
    return "S_t = S + K^T Delta; put it into Delta = Diag(beta) (V - K S_t) and solve for Delta."


def _steps(rng, K, V):
    """(name, step, whether it is a gradient step, hint) of seven affine steps."""
    k, v, b = rng.normal(size=K), rng.normal(size=V), rng.uniform(0.2, 0.9, size=K)
    k /= np.linalg.norm(k)
    eps = rng.uniform(0.1, 0.5, size=V)
    turn = np.eye(K)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    new, erase = np.outer(k, v), np.eye(K) - 0.7 * np.outer(k, k)
    linear = "look at the matrix that multiplies the state: a second derivative is symmetric."
    yield "DeltaNet's step", lambda S: erase @ S + 0.7 * new, True, linear
    yield (
        "GLA's step",
        lambda S: b[:, None] * S + new,
        True,
        "a diagonal matrix is symmetric, the write is constant.",
    )
    yield (
        "KDA's step",
        lambda S: (erase * b) @ S + 0.7 * new,
        False,
        "(I - beta k k^T) Diag(alpha): " + linear,
    )
    yield (
        "Longhorn's step",
        lambda S: (1 - np.outer(k**2, eps)) * S + np.outer(k, eps * v),
        True,
        ("a value channel has its own matrix, and all of them are diagonal."),
    )
    yield "a step that turns two channels", lambda S: turn @ S + new, False, linear
    yield (
        "RWKV-7's step",
        lambda S: 0.9 * S - np.outer(k * b, k @ S) + new,
        False,
        "(kappa eta) kappa^T: " + linear,
    )
    yield "a step that adds", lambda S: S + new, True, "its loss is linear."


def _implicit(q, k, v, beta, diagonal=False):
    o = np.zeros(v.shape)
    S = np.zeros((len(q), q.shape[-1], v.shape[-1]))
    for t in range(q.shape[1]):
        eps = beta[:, t] / (1 + beta[:, t] * (k[:, t] ** 2).sum(-1, keepdims=True))
        if diagonal:
            S = (1 - k[:, t, :, None] ** 2 * eps[:, None]) * S + k[:, t, :, None] * (eps * v[:, t])[:, None]
        else:
            old = np.einsum("nk,nkv->nv", k[:, t], S)
            S = S + k[:, t, :, None] * (eps * (v[:, t] - old))[:, None]
        o[:, t] = np.einsum("nk,nkv->nv", q[:, t], S)
    return o
