"""Checkers of the exercises in book/foundations/online_softmax.md. NumPy alone at import."""

import math
import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: the triple, the mean and the log-sum-exp of two merged blocks.

    Args:
        answer: (m, l, a, mean, lse) as numbers; a is the weighted sum before division.
    """
    expected = (math.log(4), 2.0, 9.0, 4.5, math.log(8))
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted("put your five numbers in the place of the dots: (m, l, a, mean, lse).") from None
    if len(got) != 5:
        raise Wrong(f"give five numbers, (m, l, a, mean, lse); you gave {len(got)}")
    hints = (
        "the maximum of both blocks is ln 4",
        "block A's sum, 4/3, was taken relative to ln 3: multiply it by e^(ln 3 - ln 4) before adding",
        "block A's weighted sum, 28/3, shrinks by the same factor as its sum does",
        "the mean is a / l, divided once, at the end",
        "lse = m + ln l, with the merged m and l",
    )
    for name, x, y, hint in zip(("m", "l", "a", "mean", "lse"), got, expected, hints, strict=True):
        if not math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-3):
            raise Wrong(f"{name}: you gave {x:.4g}; {hint}")
    return "all five agree with the direct sum (1*4 + 3*8 + 4*2) / (1 + 3 + 4) = 4.5 and with ln 8."


def exercise_2(combine):
    """Code: k partial outputs and their log-sum-exps become the whole output and its log-sum-exp.

    Args:
        combine: function (outs [k, V], lses [k]) -> (o [V], lse).
    """
    rng = np.random.default_rng(7)
    cases = {
        "three blocks of ordinary scores": (rng.normal(size=30), [10, 10, 10]),
        "blocks of unequal length": (rng.normal(size=13), [1, 5, 7]),
        "scores around 2000": (2000 + 5 * rng.normal(size=24), [8, 8, 8]),
        "scores around -2000": (-2000 + 5 * rng.normal(size=24), [8, 8, 8]),
        "a block without any key (lse = -inf, o = 0)": (rng.normal(size=9), [4, 0, 5]),
        "one single block": (rng.normal(size=6), [6]),
    }
    for what, (x, lengths) in cases.items():
        v = rng.normal(size=(x.size, 3))
        ends = np.cumsum([0, *lengths])
        parts = [_direct(x[a:b], v[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        outs, lses = np.array([o for o, _ in parts]), np.array([lse for _, lse in parts])
        o, lse = _direct(x, v)
        got = _pair(combine(outs.copy(), lses.copy()), "combine(outs, lses)", "(o, lse)")
        must_be_close(got[0], o, what, what="the output", hint="The weight of part i is e^(lse_i - lse).")
        hint = "lse = M + ln sum_i e^(lse_i - M), with M the largest lse_i."
        must_be_close(got[1], lse, what, what="the lse", hint=hint)
    return f"{len(cases)} cases agree with the undivided sum, far scores and an empty block included."


def exercise_3(stream):
    """Code: the softmax-weighted mean of pairs that pass by once, in three numbers.

    Args:
        stream: function (iterator of (score, value)) -> mean.
    """
    rng = np.random.default_rng(3)
    cases = {
        "five ordinary scores": rng.normal(size=5),
        "one score": np.array([3.0]),
        "scores that rise": np.arange(40.0),
        "scores that fall": -np.arange(40.0),
        "scores up to 5000": 5000 * rng.uniform(-1, 1, size=200),
        "scores near -1e6": -1e6 + rng.normal(size=200),
    }
    for what, x in cases.items():
        v = rng.normal(size=x.size)
        with np.errstate(all="ignore"):
            got = stream(zip(x.tolist(), v.tolist(), strict=True))
        hint = "When the maximum moves, both sums are multiplied by e^(m_old - m_new)."
        must_be_close(got, _direct(x, v[:, None])[0][0], what, hint=hint)
    n = 20_000
    tracemalloc.start()
    try:
        got = stream((math.sin(i), 1.0) for i in range(n))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    must_be_close(
        got, 1.0, f"{n} scores whose values are all 1", hint="The mean of equal values is that value."
    )
    if peak > 50_000:
        raise Wrong(
            f"the answers are right, but {n} scores took {peak:,} bytes at their peak: you kept them. "
            "Keep three numbers, and look at each pair once"
        )
    return (
        f"{len(cases)} streams agree with the two-pass answer; {n} scores took {peak:,} bytes at their peak."
    )


def exercise_4(key_blocks):
    """Code: first and last key block that a query tile needs under a causal window.

    Args:
        key_blocks: function (i, *, T, BM, BN, window) -> (first, last), both inclusive; window None
            means causal without a window.
    """
    count = 0
    for T, BM, BN in ((16, 4, 4), (17, 4, 4), (64, 16, 8), (64, 8, 16), (50, 16, 8), (9, 16, 4), (40, 1, 8)):
        for window in (None, 1, 3, 8, 9, 25, 1000):
            t, j = np.arange(T)[:, None], np.arange(T)[None]
            seen = (j <= t) & (j > t - (window or T))
            for i in range(-(-T // BM)):
                needed = np.flatnonzero(seen[i * BM : (i + 1) * BM].any(0)) // BN
                what = f"key_blocks({i}, T={T}, BM={BM}, BN={BN}, window={window})"
                got = _pair(key_blocks(i, T=T, BM=BM, BN=BN, window=window), what, "(first, last)")
                want = (int(needed.min()), int(needed.max()))
                if tuple(got) != want:
                    raise Wrong(f"{what} gave {tuple(got)}, expected {want}; {_block_hint(got, want)}")
                count += 1
    return f"{count} query tiles agree with the mask itself, ragged last tiles and windows of 1 included."


def exercise_5(kernel):
    """Kernel puzzle: log-sum-exp of every row in one pass over its blocks.

    Args:
        kernel: @triton.jit function (x_ptr, lse_ptr, T, BLOCK: tl.constexpr), one program a row of a
            contiguous [R, T] matrix.
    """
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        raise Wrong(
            f"this puzzle needs {missing.name}: open the chapter in Colab or Jupyter on Linux"
        ) from None
    if not hasattr(kernel, "run"):
        raise Wrong("decorate the kernel with @triton.jit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gen = torch.Generator().manual_seed(0)
    for R, T, BLOCK, shift in (
        (2, 16, 16, 0),
        (3, 40, 16, 0),
        (2, 5, 16, 0),
        (2, 33, 8, 300),
        (2, 33, 8, -300),
    ):
        what = f"rows of {T} scores around {shift}, BLOCK={BLOCK}"
        x = (shift + 3 * torch.randn(R, T, generator=gen)).to(device)
        x[0] = x[0].sort().values  # the maximum moves at every block
        untouched = 12345.0
        out = torch.full((R,), untouched, device=device)
        kernel[(R,)](x, out, T, BLOCK=BLOCK)
        if (out == untouched).all():
            raise NotStarted("your kernel stores nothing yet: put the row's result at lse_ptr + row.")
        if out.isnan().all():
            raise Wrong(f"{what}: nothing but NaN; beware -inf - -inf, and of a sum that overflowed")
        want = torch.logsumexp(x.double(), 1)
        off = (out.double() - want).abs()
        if not bool((off <= 1e-4 + 1e-6 * want.abs()).all()):
            r = int(off.nan_to_num(torch.inf).argmax())
            raise Wrong(
                f"{what}: row {r} gave {out[r]:.6g}, expected {want[r]:.6g}. "
                "Do lanes past T load -inf, and does l shrink by e^(m_old - m_new)?"
            )
    return "five shapes agree with torch.logsumexp: ragged rows, rising maxima, scores near 300 and -300."


def _direct(x, v):
    """Softmax-weighted mean and log-sum-exp of all scores at once; (0, -inf) of none."""
    if x.size == 0:
        return np.zeros(v.shape[1]), -np.inf
    m = x.max()
    p = np.exp(x - m)
    return p @ v / p.sum(), m + np.log(p.sum())


def _pair(answer, call, names):
    if answer is None or answer is ...:
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        first, second = answer
    except (TypeError, ValueError):
        raise Wrong(f"{call} returned {answer!r}, expected the two results {names}") from None
    return first, second


def _block_hint(got, want):
    if got[1] != want[1]:
        return "the last key that the tile's last query sees is itself; a ragged last tile ends at T - 1"
    return "the first key belongs to the tile's FIRST query: its position minus window - 1, not below 0"
