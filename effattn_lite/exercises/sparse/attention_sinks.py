"""Checkers of the exercises in book/sparse/attention_sinks.md. NumPy alone at import."""

import math

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: the factor of a lost sink, a cache in bytes, and two places in it.

    Args:
        answer: (factor, cache_bytes, place, distance).
    """
    expected = (10.0, 23_592_960, 13, 1023)
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted("put your four numbers in the place of the dots.") from None
    if len(got) != 4:
        raise Wrong(f"Give four numbers, (factor, cache_bytes, place, distance); you gave {len(got)}.")
    hints = (
        "what is kept of the output is divided by the mass that is left, 1 - 0.9",
        "count both keys and values: 1024 entries, 30 layers, 3 heads, 64 numbers each, 2 bytes a number",
        "the window of token 5000 begins at token 5000 - 1020 + 1, and four sinks stand before it",
        "the query has the last of 1024 places, token 0 the first, place 0",
    )
    names = ("factor", "cache_bytes", "place", "distance")
    for name, x, y, hint in zip(names, got, expected, hints, strict=True):
        if not math.isclose(x, y, rel_tol=1e-6):
            raise Wrong(f"`{name}`: you gave {x:,.6g}. Hint: {hint}.")
    return "a tenfold output, 23.6 MB, place 13 and distance 1023: four of four."


def exercise_3(places):
    """Code: the place in the cache, in order of age, of every slot of the ring.

    Args:
        places: function (t, *, sinks, window) -> integers, one a slot in use.
    """
    count = 0
    for sinks, window in ((4, 8), (0, 5), (1, 1), (3, 7), (4, 1)):
        slots = {}
        for t in range(3 * (sinks + window) + 2):
            slots[t if t < sinks else sinks + (t - sinks) % window] = t
            held = np.array([slots[i] for i in range(len(slots))])
            order = np.argsort(np.argsort(held))
            given = f"`t = {t}, sinks = {sinks}, window = {window}` (the slots hold tokens {held.tolist()})"
            hint = "Which slot holds the oldest token of the window? Count from it, round the ring."
            must_be_close(places(t, sinks=sinks, window=window), order, given, hint=hint)
            count += 1
    return f"{count} caches are in order, from the first token to the third turn of the ring."


def exercise_4(weights):
    """Code: softmax with a learned sink, for scores of any size.

    Args:
        weights: function (scores [T], b) -> weights [T] of the keys, without the sink's.
    """
    rng = np.random.default_rng(4)
    cases = {
        "scores of ordinary size, b = 1": (rng.normal(size=6), 1.0),
        "b = 0, softmax off by one": (rng.normal(size=4), 0.0),
        "b = -inf, which is softmax": (rng.normal(size=5), -np.inf),
        "scores near -50, b = 0: the head says nothing": (-50 + rng.normal(size=5), 0.0),
        "scores near 1000": (1000 + rng.normal(size=5), 999.0),
        "scores near -1000, b = -1001": (-1000 + rng.normal(size=5), -1001.0),
        "b = 2000, far above the scores": (rng.normal(size=3), 2000.0),
    }
    for given, (x, b) in cases.items():
        m = max(x.max(), b)
        expected = np.exp(x - m) / (np.exp(b - m) + np.exp(x - m).sum())
        with np.errstate(all="ignore"):
            got = weights(x.copy(), b)
        hint = "Subtract the largest of the scores and b from all of them, b included."
        must_be_close(got, expected, given, hint=hint, atol=1e-30)
    return (
        f"{len(cases)} rows are right: ordinary and huge scores, plain softmax as a limit, and a silent head."
    )


def exercise_5(kernel):
    """Kernel puzzle: log-sum-exp of a row under sinks + window, loading only the blocks that hold a seen key.

    Args:
        kernel: @triton.jit function (x_ptr, lse_ptr, loads_ptr, T, SINKS, WINDOW, BLOCK: tl.constexpr).
            Program t has row t of a contiguous [T, T] matrix; it stores the log-sum-exp of the keys in
            sight and the number of blocks that it loaded.
    """
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        raise Wrong(
            f"This puzzle needs {missing.name}: open the chapter in Colab or Jupyter on Linux."
        ) from None
    if kernel is None or not hasattr(kernel, "run"):
        raise NotStarted("write the kernel and decorate it with @triton.jit.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gen = torch.Generator().manual_seed(0)
    for T, sinks, window, BLOCK in (
        (16, 2, 4, 4),
        (40, 4, 8, 8),
        (37, 0, 5, 8),
        (37, 9, 1, 4),
        (20, 4, 99, 8),
    ):
        t, j = torch.arange(T)[:, None], torch.arange(T)
        see = (j <= t) & ((j < sinks) | (j > t - window))
        # a key that must not be seen is far above all others
        x = torch.where(see, torch.randn(T, T, generator=gen), torch.tensor(1e4)).to(device)
        lse, loads = (
            torch.full((T,), float("nan"), device=device),
            torch.zeros(T, dtype=torch.int32, device=device),
        )
        kernel[(T,)](x, lse, loads, T, sinks, window, BLOCK=BLOCK)
        given = f"`T = {T}, SINKS = {sinks}, WINDOW = {window}, BLOCK = {BLOCK}`"
        if lse.isnan().all():
            raise NotStarted("store the log-sum-exp of row t at lse_ptr + t; all are NaN as yet.")
        want = x.cpu().double().masked_fill(~see, -torch.inf).logsumexp(1)
        hint = "Mask by key: j <= t, and j < SINKS or j > t - WINDOW; a key in both blocks counts once."
        must_be_close(lse, want, given, rtol=1e-5, what="the kernel", hint=hint)
        need = [len({i // BLOCK for i in see[n].nonzero()[:, 0].tolist()}) for n in range(T)]
        hint = "Visit the sink blocks, then the window's; a block that is both is visited once."
        must_be_close(loads, need, given, what="the count of blocks", hint=hint)
    return "five shapes agree with torch.logsumexp, and no row loads a block that it does not need."
