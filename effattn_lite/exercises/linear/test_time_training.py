"""Checkers of book/linear/test_time_training.md. NumPy alone at import."""

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answers):
    """By hand: one fact told again and again, in mini-batches of one, four and two, to a linear model.

    Args:
        answers: what the key reads after four tokens, in mini-batches of 1, 4 and 2; and the largest rate for
            which mini-batches of sixteen such tokens settle.
    """
    try:
        started = not any(x is ... or x is None for x in answers)
        one, four, two, limit = answers
    except (TypeError, ValueError):
        raise Wrong(f"your answer is {answers!r}, expected four numbers") from None
    if not started:
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    given = "a key of length 1 that reads 0, the value 1 and the rate 1/2, told four times"
    asked = (
        (one, 15 / 16, "mini-batches of one", "Each step halves the distance from 1."),
        (four, 2, "one mini-batch of four", "All four gradients are taken where the key reads 0."),
        (two, 1, "two mini-batches of two", "After the first two the key reads 1, and the error is 0."),
    )
    for got, want, words, hint in asked:
        must_be_close(got, want, given, what=f"the answer in {words}", hint=hint, rtol=2e-3)
    hint = "A mini-batch multiplies the distance from the value by 1 - 16 eta."
    must_be_close(
        limit, 1 / 8, "sixteen tellings a mini-batch", what="the largest rate", hint=hint, rtol=2e-3
    )
    return (
        "15/16, 2 and 1 after the same four tokens; told sixteen times at once, the rate must stay below 1/8."
    )


def exercise_2(scaled):
    """Proof and code: the inner model c times as large, with the rate that makes the same outputs.

    Args:
        scaled: function (w, b, eta, c) -> (w, b, eta).
    """
    from effattn_lite.reference.ttt_linear import dual

    rng = np.random.default_rng(2)
    for c in (2.0, 0.5, 30.0):
        q, k, v = rng.normal(size=(3, 1, 20, 2, 8))
        w, b = rng.normal(size=(2, 8, 8)), rng.normal(size=(2, 8))
        eta = rng.uniform(0, 0.1, size=(1, 20, 2))
        norm = dict(ln_weight=1 + rng.normal(size=(2, 8)) / 4, ln_bias=rng.normal(size=(2, 8)), batch_size=4)
        got = scaled(w.copy(), b.copy(), eta.copy(), c)
        given = f"c = {c:g}"
        try:
            w2, b2, eta2 = got
        except (TypeError, ValueError):
            raise Wrong(f"Given {given}, you returned {got!r}, expected (w, b, eta)") from None
        if any(x is ... or x is None for x in got):
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        must_be_close(w2, c * w, given, what="w", hint="The model is to be c times as large.")
        must_be_close(b2, c * b, given, what="b", hint="The bias is a part of the model: scale it too.")
        o, _ = dual(q, k, v, w=w, b=b, eta=eta, **norm)
        o2, _ = dual(q, k, v, w=w2, b=b2, eta=np.broadcast_to(eta2, eta.shape), **norm)
        hint = "Gradients are 1/c of what they were, and the steps must be c times what they were."
        must_be_close(o2, o, given, what="TTT-Linear with your model and rate", hint=hint, rtol=1e-4)
    return "For three c 20 outputs are the same: only the rate over the model's squared size counts."


def exercise_3(minibatch):
    """Code: the dual form of one mini-batch, with bias, for one head.

    Args:
        minibatch: function (q, k, g, eta, W, b) -> (Z, W, b); g [n, K] are the tokens' gradients by z.
    """
    rng = np.random.default_rng(3)
    for n, K in ((1, 4), (5, 4), (16, 8)):
        q, k, g = rng.normal(size=(3, n, K))
        eta, W, b = rng.uniform(size=n), rng.normal(size=(K, K)), rng.normal(size=K)
        given = f"{n} tokens, K = {K}"
        kept = W.copy(), b.copy()
        got = minibatch(q, k, g, eta, W, b)
        try:
            Z, W1, b1 = got
        except (TypeError, ValueError):
            raise Wrong(f"Given {given}, your function returned {got!r}, expected (Z, W, b)") from None
        if not (np.array_equal(kept[0], W) and np.array_equal(kept[1], b)):
            raise Wrong(f"Given {given}, you changed the caller's W or b in place; make new arrays.")
        want_Z, W2, b2 = [], W, b
        for t in range(n):
            W2, b2 = W2 - eta[t] * np.outer(k[t], g[t]), b2 - eta[t] * g[t]
            want_Z.append(q[t] @ W2 + b2)
        hint = (
            "Row i sums k_j q_i + 1 over j up to i, its own step too, and each step has its own rate eta_j."
        )
        must_be_close(Z, np.stack(want_Z), given, what="Z", hint=hint)
        must_be_close(W1, W2, given, what="W", hint="All steps at once: K^T times eta g.")
        must_be_close(b1, b2, given, what="b", hint="The bias is the row of a key that is always 1.")
    return "Mini-batches of 1, 5 and 16 tokens agree with one model a token, and none of those was made."


def exercise_4(rounds):
    """Code: mini-batches of one by repeated rounds over a whole chunk.

    Args:
        rounds: function (k, v, eta, W, b, gradient, m) -> g [n, K] after m rounds; gradient(z, target).
    """
    rng = np.random.default_rng(4)
    n, K = 12, 6
    k, v = rng.normal(size=(2, n, K))
    eta, W, b = rng.uniform(0.02, 0.2, size=n), rng.normal(size=(K, K)) / 2, rng.normal(size=K)
    want, W2, b2 = [], W, b
    for t in range(n):
        want.append(_gradient(k[t] @ W2 + b2, v[t] - k[t]))
        W2, b2 = W2 - eta[t] * np.outer(k[t], want[-1]), b2 - eta[t] * want[-1]
    want, given = np.stack(want), "12 tokens, K = 6"
    first = _gradient(k @ W + b, v - k)
    hint = "The first round takes all gradients at W, b: there is nothing to correct yet."
    must_be_close(rounds(k, v, eta, W, b, _gradient, 1), first, given + ", one round", hint=hint)
    hint = "A token's model has the steps of the tokens before it, and not its own: tril(K K^T + 1, -1)."
    for m in (2, 5, 12):
        got = rounds(k, v, eta, W, b, _gradient, m)
        must_be_close(
            np.asarray(got)[:m], want[:m], f"{given}, the first {m} tokens after {m} rounds", hint=hint
        )
    return "After m rounds the first m gradients are those of mini-batches of one, for m = 1, 2, 5 and 12."


def exercise_5(kernel):
    """Kernel puzzle: the gradient through the layer norm.

    Args:
        kernel: @triton.jit function (z_ptr, target_ptr, weight_ptr, bias_ptr, g_ptr, K, BK), BK a
            tl.constexpr; z, target, g [N, K], weight, bias [K], contiguous float32; one program a row.
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
    for N, K, shift in ((1, 8, 0.0), (4, 16, 0.0), (3, 13, 100.0)):
        z, target = rng.normal(size=(N, K)) + shift, rng.normal(size=(N, K))
        weight, bias = 1 + rng.normal(size=K) / 4, rng.normal(size=K)
        z = z.astype(np.float32).astype(np.float64)
        g = torch.full((N, K), float("nan"), device=device)
        tensors = [torch.tensor(x, dtype=torch.float32, device=device) for x in (z, target, weight, bias)]
        kernel[(N,)](*tensors, g, K, BK=triton.next_power_of_2(K))
        want = _gradient(z, target, weight, bias)
        hint = (
            "Lanes beyond K must be 0 again after the mean was taken off; all means are over K, not over BK."
        )
        given = f"{N} rows, K = {K}, around {shift:g}"
        must_be_close(g, want, given, what="the kernel", hint=hint, rtol=1e-4 if shift == 0 else 1e-3)
    return "Rows of 8, 16 and 13 channels agree, also around 100: the variance was taken in two passes."


def _gradient(z, target, weight=1.0, bias=0.0):
    z = z - z.mean(-1, keepdims=True)
    sigma = np.sqrt((z * z).mean(-1, keepdims=True) + 1e-6)
    z = z / sigma
    u = weight * (weight * z + bias - target)
    return (u - u.mean(-1, keepdims=True) - z * (u * z).mean(-1, keepdims=True)) / sigma
