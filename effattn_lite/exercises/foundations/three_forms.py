"""Checkers of the exercises in book/foundations/three_forms.md. NumPy alone at import."""

import math
import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close

_NOT_STARTED = "replace the dots by your answer, then run the cell again."


def exercise_1(answer):
    """By hand: one state, one chunk, one scan, one chunk length.

    Args:
        answer: (S_4, what the second chunk writes, combinations of a doubling scan of 8, best chunk length).
    """
    names = ("S_4", "U", "combinations", "C*")
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted(f"put your numbers in the place of the dots: ({', '.join(names)}).") from None
    if len(got) != len(names):
        raise Wrong(f"give {len(names)} numbers, ({', '.join(names)}); you gave {len(got)}")
    expected = (4.0, 2.0, 17.0, math.sqrt(2**20 / 512))
    hints = (
        "halve the state, then add the token: 8, then 4 + 4, and so on",
        "the second chunk starts from zero: halve its first token once, then add its second",
        "the rounds of distance 1, 2 and 4 combine 8 - 1, 8 - 2 and 8 - 4 pairs",
        "the step's price over 2 (K + V) is C squared",
    )
    for name, x, y, hint in zip(names, got, expected, hints, strict=True):
        if abs(x - y) > 0.005 * y:
            raise Wrong(f"{name}: you gave {x:.4g}; {hint}")
    return "S_4 = 4 either way: 8 / 4 from the first chunk and 2 from the second; 17 combinations; C* = 45."


def exercise_2(work):
    """Proof and code: rounds and combinations of Hillis and Steele's scan.

    Args:
        work: function T -> (rounds, combinations).
    """
    for T in (1, 2, 3, 4, 5, 7, 8, 9, 16, 100, 1000, 1024, 1025, 10**6):
        rounds = combined = 0
        d = 1
        while d < T:
            rounds, combined, d = rounds + 1, combined + T - d, 2 * d
        got = work(T)
        if got is None or got is ... or (isinstance(got, tuple) and any(x is ... for x in got)):
            raise NotStarted(_NOT_STARTED)
        try:
            pair = tuple(float(x) for x in got)
        except (TypeError, ValueError):
            raise Wrong(f"work({T}) returned {got!r}, expected (rounds, combinations)") from None
        if pair != (rounds, combined):
            hint = "the round of distance d combines T - d pairs, for d = 1, 2, 4, ... below T"
            raise Wrong(f"work({T}) gave {got}, expected {(rounds, combined)}; {hint}")
    return "fourteen lengths agree with a count of every pair, one token and a million included."


def exercise_3(decay_mask):
    """Code: the mask of the parallel form, for decays of any strength.

    Args:
        decay_mask: function g [T] -> D [T, T], D[t, n] the product of e^g over tokens n + 1 .. t, 0 above.
    """
    rng = np.random.default_rng(3)
    cases = {
        "five mild decays": -rng.uniform(0, 1, size=5),
        "one token": np.array([-0.7]),
        "no decay at all": np.zeros(7),
        "300 tokens with g = -20": np.full(300, -20.0),
        "mild decays and one of -1000": np.array([-0.1, -0.2, -1000.0, -0.3, -0.1]),
        "2,000 tokens with g near -0.01": -rng.uniform(0, 0.02, size=2000),
        "g = -8 in float32, 40 tokens": np.full(40, -8.0, np.float32),
    }
    for what, g in cases.items():
        with np.errstate(all="ignore"):
            got = decay_mask(g.copy())
        T, wide = len(g), g.astype(float)
        t = np.arange(T)
        ends = np.cumsum(wide)
        want = np.where(t[:, None] >= t, np.exp(np.minimum(0, ends[:, None] - ends)), 0)
        shape = np.shape(got)
        turned = shape == want.shape and np.allclose(got, want.T, atol=1e-6)
        if turned and not np.allclose(want, want.T, atol=1e-6):
            raise Wrong(f"{what}: this is the mask transposed; row t must look back, at columns n <= t")
        must_be_close(got, want, what, rtol=1e-4, hint=_mask_hint(got, wide), what="the mask")
    return f"{len(cases)} masks agree, with decays from none to e^-1000: only differences were exponentiated."


def _mask_hint(got, g):
    if np.shape(got) == (len(g), len(g)) and not np.isfinite(np.asarray(got, float)).all():
        return "Never divide by a product of decays, it may be zero: take the difference of the logs, then e."
    if np.shape(got) == (len(g), len(g)) and np.allclose(np.diag(got), np.exp(g)):
        return "D[t, t] is 1: a token's own decay comes before it is written, and does not touch it."
    return "D[t, n] = e^(G_t - G_n) for n <= t, with G the running sum of g, and 0 for n > t."


def exercise_4(chunkwise):
    """Code: chunks of any lengths.

    Args:
        chunkwise: function (q [T, K], k [T, K], v [T, V], g [T], S [K, V], lengths) -> (o [T, V], S), where
            lengths are those of the chunks, in order.
    """
    rng = np.random.default_rng(4)
    count = 0
    for lengths in ((6,), (1, 1, 1), (3, 4), (1, 7, 2), (16, 16, 16, 5), (40, 1, 1, 9)):
        for strength in (0.0, 0.3, 30.0):
            T = sum(lengths)
            q, k, v = rng.normal(size=(T, 5)), rng.normal(size=(T, 5)), rng.normal(size=(T, 3))
            g, S0 = -strength * rng.uniform(size=T), rng.normal(size=(5, 3))
            what, before = f"chunks of {lengths} tokens, decays down to e^-{strength:g}", S0.copy()
            with np.errstate(all="ignore"):
                got = chunkwise(q.copy(), k.copy(), v.copy(), g.copy(), S0, lengths)
            if got is None or got is ...:
                raise NotStarted(_NOT_STARTED)
            try:
                o, S = got
            except (TypeError, ValueError):
                raise Wrong(f"{what}: expected the two results (o, S)") from None
            if not np.array_equal(S0, before):
                raise Wrong(f"{what}: you wrote into the caller's state; make a new array")
            want_o, want_S = _recurrence(q, k, v, g, S0)
            must_be_close(o, want_o, what, rtol=1e-8, what="the output", hint=_chunk_hint(o, want_o, lengths))
            hint = "The old state fades by the whole chunk's decay; token j by the decays after it."
            must_be_close(S, want_S, what, rtol=1e-8, what="the final state", hint=hint)
            count += 1
    T = 4096
    q, k, v = (rng.normal(size=(T, 4)) for _ in range(3))
    tracemalloc.start()
    try:
        chunkwise(q, k, v, np.full(T, -0.01), np.zeros((4, 4)), (32,) * 128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 8e6:
        raise Wrong(
            f"all numbers agree, but {T} tokens took {peak / 1e6:.0f} MB: a T x T array is made somewhere"
        )
    return f"{count} cases agree with the recurrence; {T} tokens in chunks of 32 took {peak / 1e3:.0f} kB."


def _chunk_hint(got, want, lengths):
    first = lengths[0]
    if np.shape(got) == want.shape and np.allclose(got[:first], want[:first]) and len(lengths) > 1:
        return "The first chunk is right: look at the state that you hand on."
    return "Token t of a chunk reads the incoming state through the decays of tokens 1 .. t of the chunk."


def _recurrence(q, k, v, g, S):
    o = np.zeros_like(v)
    for t in range(len(q)):
        S = np.exp(g[t]) * S + np.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o, S


class _Item:
    """A value that knows how many combinations in line made it."""

    def __init__(self, g, S, depth=0):
        self.g, self.S, self.depth = g, S, depth


def exercise_5(scan):
    """Code: an inclusive scan with linear work and logarithmic depth, for any associative operation.

    Args:
        scan: function (op, items) -> list of the prefixes items[0], op(items[0], items[1]), ...
    """
    rng = np.random.default_rng(5)
    for T in (1, 2, 3, 4, 5, 8, 13, 16, 64, 100, 257):
        items = [_Item(-rng.uniform(), rng.normal(size=(2, 2))) for _ in range(T)]
        count = 0

        def op(first, second):
            nonlocal count
            count += 1
            S = math.exp(second.g) * first.S + second.S
            return _Item(first.g + second.g, S, 1 + max(first.depth, second.depth))

        got = scan(op, list(items))
        if got is None or got is ...:
            raise NotStarted(_NOT_STARTED)
        if not hasattr(got, "__len__") or len(got) != T:
            raise Wrong(f"{T} items: expected a list of {T} prefixes, one for every item")
        g, S = 0.0, np.zeros((2, 2))
        for t, item in enumerate(items):
            g, S = g + item.g, math.exp(item.g) * S + item.S
            if not hasattr(got[t], "S"):
                raise Wrong(f"{T} items: prefix {t} is no item; combine with op alone")
            if not (np.allclose(got[t].S, S) and math.isclose(got[t].g, g)):
                hint = "op(first, second) takes the earlier stretch first; prefix t holds items 0 .. t"
                raise Wrong(f"{T} items: prefix {t} is wrong; {hint}")
        depth, most = max(x.depth for x in got), 2 * math.ceil(math.log2(T)) + 1 if T > 1 else 0
        if count > 2 * T:
            raise Wrong(f"{T} items: right, but with {count} combinations; 2 T = {2 * T} are enough")
        if depth > most:
            raise Wrong(
                f"{T} items: right, but {depth} combinations wait in line; {most} are enough: build a tree"
            )
    return f"eleven lengths agree; 257 items took {count} combinations, at most {depth} of them in line."
