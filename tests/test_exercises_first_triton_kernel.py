"""The checkers of foundations/first_triton_kernel, its figure's arithmetic, and what the compiler says."""

import os

import numpy as np
import pytest

from effattn_lite.exercises import check

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS
    triton = None

CHAPTER = "foundations/first_triton_kernel"
HAND = (12, 0.3896, 3, 129600, 32768)


def layer_norm(memory, pid, x, o, C, BLOCK):
    o_c = np.arange(BLOCK)
    m_c = o_c < C
    b_x = memory.load(x + pid[0] * C + o_c, m_c)
    b_x = np.where(m_c, b_x - b_x.sum() / C, 0)
    memory.store(o + pid[0] * C + o_c, b_x / np.sqrt((b_x**2).sum() / C + 1e-5), m_c)


def squares_masked_lanes(memory, pid, x, o, C, BLOCK):
    o_c = np.arange(BLOCK)
    b_x = memory.load(x + pid[0] * C + o_c, o_c < C)
    b_x = b_x - b_x.sum() / C
    memory.store(o + pid[0] * C + o_c, b_x / np.sqrt((b_x**2).sum() / C + 1e-5), o_c < C)


def divides_by_the_block(memory, pid, x, o, C, BLOCK):
    o_c = np.arange(BLOCK)
    m_c = o_c < C
    b_x = memory.load(x + pid[0] * C + o_c, m_c)
    b_x = np.where(m_c, b_x - b_x.mean(), 0)
    memory.store(o + pid[0] * C + o_c, b_x / np.sqrt((b_x**2).mean() + 1e-5), m_c)


def has_no_mask(memory, pid, x, o, C, BLOCK):
    p = pid[0] * C + np.arange(BLOCK)
    b_x = memory.load(x + p)
    b_x = b_x - b_x.mean()
    memory.store(o + p, b_x / np.sqrt((b_x**2).mean() + 1e-5))


# kernels that a reader might write
if triton is not None:

    @triton.jit
    def causal_softmax(x, o, C, s_xr, s_xc, s_or, s_oc, scale, BLOCK: tl.constexpr):
        """Right."""
        i_r = tl.program_id(0).to(tl.int64)
        o_c = tl.arange(0, BLOCK)
        see = (o_c < C) & (o_c <= i_r)
        b_x = scale * tl.load(x + i_r * s_xr + o_c * s_xc, mask=see, other=0.0)
        b_x = tl.where(see, b_x, -float("inf"))
        b_p = tl.exp(b_x - tl.max(b_x, 0))
        tl.store(o + i_r * s_or + o_c * s_oc, b_p / tl.sum(b_p, 0), mask=o_c < C)

    @triton.jit
    def assumes_contiguous_rows(x, o, C, s_xr, s_xc, s_or, s_oc, scale, BLOCK: tl.constexpr):
        """Ignores the strides of x."""
        i_r = tl.program_id(0)
        o_c = tl.arange(0, BLOCK)
        see = (o_c < C) & (o_c <= i_r)
        b_x = scale * tl.load(x + i_r * C + o_c, mask=see, other=0.0)
        b_x = tl.where(see, b_x, -float("inf"))
        b_p = tl.exp(b_x - tl.max(b_x, 0))
        tl.store(o + i_r * s_or + o_c * s_oc, b_p / tl.sum(b_p, 0), mask=o_c < C)

    @triton.jit
    def stores_all_lanes(x, o, C, s_xr, s_xc, s_or, s_oc, scale, BLOCK: tl.constexpr):
        """The store has no mask."""
        i_r = tl.program_id(0)
        o_c = tl.arange(0, BLOCK)
        see = (o_c < C) & (o_c <= i_r)
        b_x = scale * tl.load(x + i_r * s_xr + o_c * s_xc, mask=see, other=0.0)
        b_x = tl.where(see, b_x, -float("inf"))
        b_p = tl.exp(b_x - tl.max(b_x, 0))
        m_c = o_c < tl.minimum(C + 2, BLOCK)
        tl.store(o + i_r * s_or + o_c * s_oc, b_p / tl.sum(b_p, 0), mask=m_c)

    @triton.jit
    def linear_chunks(
        q,
        k,
        v,
        o,
        S_in,
        S_out,
        T,
        K: tl.constexpr,
        V: tl.constexpr,
        C: tl.constexpr,
        READ: tl.constexpr = True,
    ):
        """Right, or with READ false deaf to the given state."""
        o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
        p_S = o_k[:, None] * V + o_v[None, :]
        b_S = tl.load(S_in + p_S) if READ else tl.zeros([K, V], tl.float32)
        for start in range(0, T, C):
            o_t = start + o_c
            m_t = o_t[:, None] < T
            p_k, p_v = o_t[:, None] * K + o_k[None, :], o_t[:, None] * V + o_v[None, :]
            b_q = tl.load(q + p_k, mask=m_t, other=0.0)
            b_k = tl.load(k + p_k, mask=m_t, other=0.0)
            b_v = tl.load(v + p_v, mask=m_t, other=0.0)
            b_A = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_A = tl.where(o_c[:, None] >= o_c[None, :], b_A, 0.0)
            b_o = tl.dot(b_A, b_v, input_precision="ieee") + tl.dot(b_q, b_S, input_precision="ieee")
            tl.store(o + p_v, b_o, mask=m_t)
            b_S += tl.dot(tl.trans(b_k), b_v, input_precision="ieee")
        tl.store(S_out + p_S, b_S)

    @triton.jit
    def deaf(q, k, v, o, S_in, S_out, T, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
        """Starts from zero whatever it is given."""
        linear_chunks(q, k, v, o, S_in, S_out, T, K, V, C, False)

    @triton.jit
    def doubled(x, o, BLOCK: tl.constexpr, PASSES: tl.constexpr):
        """Adds tiles to themselves; for the compiler."""
        p = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        b_x = tl.load(x + p)
        tl.store(o + p, tl.dot(b_x, b_x) * PASSES)


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
        (0, 6, "rows of tiles"),
        (1, 39, "share"),
        (3, 2 * (100 * 72 + 72 * 150), "once for each"),
        (4, 65536, "counted from 0"),
    ):
        verdict = check(f"{CHAPTER}/1", (*HAND[:i], wrong, *HAND[i + 1 :]))
        assert not verdict and words in verdict.words
    assert not check(f"{CHAPTER}/1", (...,) * 5).started


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (squares_masked_lanes, "no longer 0"),
        (divides_by_the_block, "divided by BLOCK"),
        (has_no_mask, "Give load and store the mask"),
    ],
)
def test_masked_variance(program, words):
    assert check(f"{CHAPTER}/3", layer_norm)
    verdict = check(f"{CHAPTER}/3", program)
    assert not verdict and words in verdict.words
    assert not check(f"{CHAPTER}/3", lambda *args: None).started


def test_causal_softmax(running):
    assert check(f"{CHAPTER}/4", causal_softmax)
    verdict = check(f"{CHAPTER}/4", assumes_contiguous_rows)
    assert not verdict and "transposed" in verdict.words
    verdict = check(f"{CHAPTER}/4", stores_all_lanes)
    assert not verdict and "beyond column" in verdict.words
    assert "triton.jit" in check(f"{CHAPTER}/4", lambda *args: None).words


def test_linear_chunks(running):
    assert check(f"{CHAPTER}/5", linear_chunks)
    verdict = check(f"{CHAPTER}/5", deaf)
    assert not verdict and "S_in" in verdict.words


def test_the_compiler_speaks_of_gpus_that_are_not_here():
    pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
    from effattn_lite.bench.compiled import compile_all

    def job(capability, kind="fp16"):
        arguments, constants = {"x": f"*{kind}", "o": "*fp32"}, {"BLOCK": 64, "PASSES": 1}
        options = {"num_warps": 4, "num_stages": 2}
        return dict(capability=capability, arguments=arguments, constants=constants, options=options)

    turing, ampere, hopper, refused = compile_all(doubled, [job(75), job(80), job(90), job(80, "fp32")])
    assert turing.instructions["fma"] and not turing.instructions["mma"]
    assert ampere.instructions["mma"] and not ampere.instructions["fma"]
    assert hopper.instructions["wgmma"] and hopper.shared >= 64 * 64 * 2
    # TF32 is what a product of float32 is, unless told otherwise
    assert refused.instructions["mma"] and refused.shared >= 64 * 64 * 4
    with pytest.raises(RuntimeError, match="compiling doubled failed"):
        compile_all(doubled, [job(80) | {"constants": {"BLOCK": 63, "PASSES": 1}}])
