"""Checkers of the exercises in book/foundations/attention_cost.md. NumPy alone at import."""

import math
import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close

_NOT_STARTED = "replace the dots by your answer, then run the cell again."


def exercise_1(answer):
    """By hand: cache, intensity and room of SmolLM2-135M.

    Args:
        answer: (bytes of cache a token, FLOP/byte of attention in decode, tokens at which the cache weighs as
            much as the weights, texts of 8,192 tokens in 80 GB).
    """
    names = ("bytes a token", "FLOP/byte", "tokens", "texts")
    got = _numbers(answer, names)
    token, weights = 30 * 3 * (64 + 64) * 2, 2 * 134.5e6
    expected = (token, 3.0, weights / token, math.floor((80e9 - weights) / (8192 * token)))
    hints = (
        "layers x key/value heads x (K + V) x bytes a number; query heads have no cache",
        "a cached number has two bytes, and each query head that shares it multiplies and adds it once",
        "the weights have 2 x 134.5 million bytes; divide them by the bytes of a token",
        "take the weights off 80e9 bytes, divide by the cache of 8,192 tokens, round down",
    )
    for name, x, y, hint in zip(names, got, expected, hints, strict=True):
        if abs(x - y) > (0 if name in ("bytes a token", "texts") else 0.002 * y):
            raise Wrong(f"{name}: you gave {x:,.6g}; {hint}")
    return "23,040 bytes a token, 3 FLOP/byte; cache and weights are even at 11,675 tokens; 422 texts fit."


def exercise_2(smallest_batch):
    """Proof and code: how many rows a product needs to reach the ridge.

    Args:
        smallest_batch: function (k, n, *, size, ridge) -> smallest whole m for which [m, k] @ [k, n] reaches
            `ridge` FLOP/byte, or None if no m does; size is bytes a number.
    """
    cases = [
        (4096, 4096, 2, 246.0),
        (4096, 14336, 2, 246.0),
        (4096, 4096, 1, 246.0),
        (8192, 8192, 2, 153.0),
        (64, 4096, 2, 246.0),
        (512, 512, 2, 246.0),
        (512, 512, 2, 300.0),
        (1000, 1000, 4, 1.0),
        (300, 300, 2, 150.0),
        (10**6, 10**6, 2, 0.5),
    ]
    started = False
    for k, n, size, ridge in cases:
        what = f"smallest_batch({k}, {n}, size={size}, ridge={ridge})"
        got = smallest_batch(k, n, size=size, ridge=ridge)
        left = 2 / (size * ridge) - 1 / k - 1 / n
        want = None if left <= 1e-12 else math.ceil(1 / left - 1e-9)
        if got is ...:
            raise NotStarted(_NOT_STARTED)
        if want is None:
            if got is not None:
                raise Wrong(
                    f"{what} gave {got}, expected None: at best it has {2 / size / (1 / k + 1 / n):.4g}"
                )
            continue
        if got is None and not started:
            raise NotStarted(_NOT_STARTED)
        started = True
        if got is None or int(got) != got or int(got) != want:
            reached = "" if got is None else f" With {got} rows it has {_intensity(got, k, n, size):.4g}."
            raise Wrong(
                f"{what} gave {got}, expected {want}.{reached} Solve "
                "(2 / size) / (1/m + 1/k + 1/n) >= ridge for m"
            )
    return f"{len(cases)} products agree, three of them too thin to reach the ridge with any batch."


def exercise_3(cache_class):
    """Code: a cache that grows without copying.

    Args:
        cache_class: class called as (capacity, HKV, K, V); its append(k [n, HKV, K], v [n, HKV, V]) returns
            all keys [T, HKV, K] and values [T, HKV, V] so far, and raises ValueError when they do not fit.
    """
    rng = np.random.default_rng(3)
    cache = cache_class(20_000, 2, 8, 6)
    if not hasattr(cache, "append"):
        raise NotStarted(_NOT_STARTED)
    keys, values = np.zeros((0, 2, 8)), np.zeros((0, 2, 6))
    for n in (5, 1, 1, 12, 1):
        k, v = rng.normal(size=(n, 2, 8)), rng.normal(size=(n, 2, 6))
        keys, values = np.concatenate((keys, k)), np.concatenate((values, v))
        got = cache.append(k, v)
        if got is None or got is ...:
            raise NotStarted(_NOT_STARTED)
        k[:] = v[:] = np.nan  # the caller's arrays are the caller's
        for x, y, name in zip(got, (keys, values), ("keys", "values"), strict=True):
            hint = "Copy the new rows into your own array, and return a view of the rows in use."
            must_be_close(x, y, f"{len(keys)} tokens in several calls", hint=hint, what=f"the {name}")
    k, v = rng.normal(size=(12_000, 2, 8)), rng.normal(size=(12_000, 2, 6))
    cache.append(k, v)
    tracemalloc.start()
    try:
        for t in range(50):
            cache.append(k[t : t + 1], v[t : t + 1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 100_000:
        raise Wrong(
            f"all numbers agree, but appending one token to 12,000 took {peak:,} bytes: you copied the "
            "cache. Make the arrays once, as large as `capacity`, and return views"
        )
    try:
        cache.append(k, v)
    except ValueError:
        return f"Appending a token to 12,000 others took {peak:,} bytes at most; a full cache refuses."
    raise Wrong("24,070 tokens went into a cache of 20,000: raise ValueError when they do not fit")


def exercise_4(serve):
    """Code: the largest batch that fits, and its tokens a second.

    Args:
        serve: function (*, weights, size, token, memory, T, copy, product) -> (batch, tokens a second).
    """
    base = dict(weights=7.5e9, size=2, token=131_072, memory=80e9, T=8192, copy=3.0e12, product=738e12)
    cases = {
        "8B, 8,192 tokens": {},
        "long texts": dict(T=131_072),
        "short texts: the weights' FLOPs decide": dict(T=16, token=1024),
        "numbers in 8 bits": dict(size=1, token=65_536),
        "no room for the weights": dict(memory=10e9),
        "room for the weights, none for a text": dict(memory=15.1e9),
    }
    for what, change in cases.items():
        z = base | change
        got = serve(**z)
        if got is None or got is ... or (isinstance(got, tuple) and any(x is ... for x in got)):
            raise NotStarted(_NOT_STARTED)
        try:
            batch, rate = (float(x) for x in got)
        except (TypeError, ValueError):
            raise Wrong(f"{what}: serve(...) returned {got!r}, expected (batch, tokens a second)") from None
        room = z["memory"] - z["size"] * z["weights"]
        want = max(0, math.floor(room / (z["T"] * z["token"])))
        if batch != want:
            hint = "a batch is whole, not negative, and every text needs T * token bytes beside the weights"
            raise Wrong(f"{what}: batch {batch:g}, expected {want}; {hint}")
        must_be_close(rate, _rate(want, z), what, rtol=1e-3, what="the rate", hint=_serve_hint(rate, want, z))
    return f"{len(cases)} machines agree, those without room too."


def _rate(batch, z):
    if batch == 0:
        return 0.0
    weights = max(z["size"] * z["weights"] / z["copy"], 2 * batch * z["weights"] / z["product"])
    return batch / (weights + batch * z["T"] * z["token"] / z["copy"])


def _serve_hint(rate, batch, z):
    if batch and math.isclose(rate, _rate(batch, z) / batch, rel_tol=1e-2):
        return "That is the rate of one text: a step writes a token for every text."
    return "A step takes max(weight bytes / copy, weight FLOPs / product), then the cache bytes / copy."


def _intensity(m, k, n, size):
    return 2 / size / (1 / m + 1 / k + 1 / n)


def _numbers(answer, names):
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted(f"put your numbers in the place of the dots: ({', '.join(names)}).") from None
    if len(got) != len(names):
        raise Wrong(f"give {len(names)} numbers, ({', '.join(names)}); you gave {len(got)}")
    return got
