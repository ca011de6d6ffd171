"""The checkers of foundations/online_softmax: a right answer passes, typical wrong ones are told why."""

import math
import os

import numpy as np
import pytest

from effattn_lite.exercises import check

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS
    triton = None

CHAPTER = "foundations/online_softmax"


def combine(outs, lses):
    top = lses.max()
    top = top if np.isfinite(top) else 0.0
    weights = np.exp(lses - top)
    return weights @ outs / weights.sum(), top + np.log(weights.sum())


def stream(pairs):
    m, l, a = -math.inf, 0.0, 0.0
    for x, v in pairs:
        new = max(m, x)
        keep, add = math.exp(m - new), math.exp(x - new)
        m, l, a = new, keep * l + add, keep * a + add * v
    return a / l


def key_blocks(i, *, T, BM, BN, window):
    first, last = i * BM, min((i + 1) * BM, T) - 1
    return (0 if window is None else max(0, first - window + 1) // BN), last // BN


# kernels that a reader might write
if triton is not None:

    @triton.jit
    def row_lse(x_ptr, lse_ptr, T, BLOCK: tl.constexpr):
        """Log-sum-exp of a row in one pass."""
        row = tl.program_id(0)
        m = -float("inf")
        l = 0.0
        for start in range(0, T, BLOCK):
            o = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row.to(tl.int64) * T + o, mask=o < T, other=-float("inf"))
            m_new = tl.maximum(m, tl.max(x, 0))
            l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)
            m = m_new
        tl.store(lse_ptr + row, m + tl.log(l))

    @triton.jit
    def forgets_the_mask(x_ptr, lse_ptr, T, BLOCK: tl.constexpr):
        """Lanes past the end count as scores of zero."""
        row = tl.program_id(0)
        m = -float("inf")
        l = 0.0
        for start in range(0, T, BLOCK):
            o = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * T + o, mask=o < T, other=0.0)
            m_new = tl.maximum(m, tl.max(x, 0))
            l = l * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)
            m = m_new
        tl.store(lse_ptr + row, m + tl.log(l))

    @triton.jit
    def unfinished(x_ptr, lse_ptr, T, BLOCK: tl.constexpr):
        """Stores nothing."""
        row = tl.program_id(0)  # noqa: F841


def test_by_hand():
    assert check(f"{CHAPTER}/1", (math.log(4), 2, 9, 4.5, math.log(8)))
    verdict = check(f"{CHAPTER}/1", (math.log(4), 4 / 3 + 1, 9, 4.5, math.log(8)))
    assert not verdict and "relative to ln 3" in verdict.words
    assert not check(f"{CHAPTER}/1", (..., ..., ..., ..., ...)).started


def test_combine():
    assert check(f"{CHAPTER}/2", combine)
    assert not check(f"{CHAPTER}/2", lambda outs, lses: None).started
    assert not check(f"{CHAPTER}/2", lambda outs, lses: (outs.mean(0), lses.max()))
    with np.errstate(all="ignore"):
        verdict = check(
            f"{CHAPTER}/2", lambda o, e: (np.exp(e) @ o / np.exp(e).sum(), np.log(np.exp(e).sum()))
        )
    assert not verdict and "2000" in verdict.words


def test_stream():
    assert check(f"{CHAPTER}/3", stream)
    assert not check(f"{CHAPTER}/3", lambda pairs: None).started

    def keeps_all(pairs):
        x, v = np.array(list(pairs)).T
        p = np.exp(x - x.max())
        return p @ v / p.sum()

    verdict = check(f"{CHAPTER}/3", keeps_all)
    assert not verdict and "you kept them" in verdict.words

    def forgets_to_rescale(pairs):
        m, l, a = -math.inf, 0.0, 0.0
        for x, v in pairs:
            m = max(m, x)
            l, a = l + math.exp(x - m), a + math.exp(x - m) * v
        return a / l

    assert "e^(m_old - m_new)" in check(f"{CHAPTER}/3", forgets_to_rescale).words


def test_key_blocks():
    assert check(f"{CHAPTER}/4", key_blocks)
    assert not check(f"{CHAPTER}/4", lambda i, *, T, BM, BN, window: None).started

    def from_the_last_query(i, *, T, BM, BN, window):
        last = min((i + 1) * BM, T) - 1
        return (0 if window is None else max(0, last - window + 1) // BN), last // BN

    assert "FIRST query" in check(f"{CHAPTER}/4", from_the_last_query).words

    def past_the_end(i, *, T, BM, BN, window):
        return key_blocks(i, T=T + BM, BM=BM, BN=BN, window=window)

    assert "T - 1" in check(f"{CHAPTER}/4", past_the_end).words


def test_kernel_puzzle():
    if triton is None:
        pytest.skip("triton exists on Linux only")
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU and Triton's interpreter is off")
    assert check(f"{CHAPTER}/5", row_lse)
    assert not check(f"{CHAPTER}/5", forgets_the_mask)
    assert not check(f"{CHAPTER}/5", unfinished).started
