"""The checkers of linear/chunkwise_kernels, and the figure's arithmetic beside the launcher's."""

import os

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.explore import SegmentPlan

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS
    triton = None

CHAPTER = "linear/chunkwise_kernels"
HAND = (320, 52, 416, 52 * 2**17, 52 * 51 // 2 * 2**17)


def enter(U, lengths, g, S, reverse, passed=None):
    """Right, or with a wrong number of tokens passed."""
    out, before = np.zeros_like(U), None
    order = range(len(U))
    for j in reversed(order) if reverse else order:
        if before is not None:
            S = np.exp(g * (lengths[before] if passed is None else passed(lengths, j))) * S + U[before]
        out[j], before = S, j
    return out


if triton is not None:

    @triton.jit
    def states(
        k, v, out, g, T, L, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LATE: tl.constexpr = 0,
        WHOLE: tl.constexpr = False,
    ):  # fmt: skip
        """Right; LATE: one step too many; WHOLE: every chunk is taken to be full."""
        o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
        i_j = tl.program_id(0)
        tokens = tl.minimum(T - i_j * L, L)
        b_S = tl.zeros([K, V], tl.float32)
        for i_c in range(0, tokens, C):
            n = tl.minimum(tokens - i_c, C)
            row, m_c = i_j * L + i_c + o_c, o_c < n
            if WHOLE:
                n = C
            b_kt = tl.load(k + row[None, :] * K + o_k[:, None], mask=m_c[None, :], other=0.0)
            b_v = tl.load(v + row[:, None] * V + o_v[None, :], mask=m_c[:, None], other=0.0)
            b_v = b_v * tl.exp(g * (tl.maximum(n - 1 - o_c, 0) + LATE))[:, None]
            b_S = tl.dot(b_kt, b_v, b_S * tl.exp(g * n), input_precision="ieee")
        tl.store(out + i_j * K * V + o_k[:, None] * V + o_v[None, :], b_S)

    @triton.jit
    def late(k, v, out, g, T, L, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
        """Every write fades once more."""
        states(k, v, out, g, T, L, K, V, C, 1)

    @triton.jit
    def whole(k, v, out, g, T, L, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
        """A ragged chunk fades as a full one."""
        states(k, v, out, g, T, L, K, V, C, 0, True)


@pytest.fixture
def running():
    """Kernels run here: on a GPU, or in the interpreter."""
    if triton is None:
        pytest.skip("triton exists on Linux only")
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU and Triton's interpreter is off")


def test_by_hand():
    assert check(f"{CHAPTER}/1", HAND)
    for i, wrong, words in (
        (0, 304, "multiple of 64"),
        (1, 51, "rounded up"),
        (2, 108, "one program"),
        (4, HAND[3] * 51, "n (n - 1) / 2"),
    ):
        verdict = check(f"{CHAPTER}/1", (*HAND[:i], wrong, *HAND[i + 1 :]))
        assert not verdict and words in verdict.words
    assert not check(f"{CHAPTER}/1", (...,) * 5).started


@pytest.mark.parametrize(
    ("passed", "words"),
    [(lambda n, j: n[0], "shorter"), (lambda n, j: n[j], "not entered next")],
)
def test_states_that_enter(passed, words):
    assert check(f"{CHAPTER}/3", enter)
    verdict = check(f"{CHAPTER}/3", lambda *given: enter(*given, passed=passed))
    assert not verdict and words in verdict.words
    verdict = check(f"{CHAPTER}/3", lambda U, n, g, S, reverse: enter(U, n, g, S, not reverse))
    assert not verdict and "other side" in verdict.words
    verdict = check(f"{CHAPTER}/3", lambda U, n, g, S, reverse: enter(U, n, g, 0 * S, reverse))
    assert not verdict and "from outside" in verdict.words
    assert not check(f"{CHAPTER}/3", lambda *given: None).started


def test_segment_states(running):
    assert check(f"{CHAPTER}/4", states)
    for kernel, words in ((late, "one step too often"), (whole, "fades by n")):
        verdict = check(f"{CHAPTER}/4", kernel)
        assert not verdict and words in verdict.words
    assert "triton.jit" in check(f"{CHAPTER}/4", lambda *args: None).words


def test_peak():
    assert check(f"{CHAPTER}/5", lambda T, H, K, V, C: 2 * T * H * (K + 2 * V + C) / 2**20)
    verdict = check(f"{CHAPTER}/5", lambda T, H, K, V, C: 2 * T * H * (K + V + C) / 2**20)
    assert not verdict and "exist at once" in verdict.words


def test_the_figure_starts_with_the_engines_choice_on_the_recorded_card():
    torch = pytest.importorskip("torch")
    from effattn_lite.kernels.decay import tiles

    state = SegmentPlan().state
    L = 64 * -(-state["tokens"] * 2 * state["heads"] // (4 * state["processors"]) // 64)
    assert state["segments"] == -(-state["tokens"] // L)
    C, _, BV, _ = tiles(128, torch.bfloat16, channel=False, capability=90)
    assert (state["chunk"], state["columns"]) == (C, BV)
    assert {T for impl, T, _ in state["recorded"] if impl == "triton"} == {2048, 8192, 32768, 131072}
    with pytest.raises(ValueError, match="power of two"):
        SegmentPlan(tokens=1000)
