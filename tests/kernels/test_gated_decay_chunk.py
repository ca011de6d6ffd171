"""The blocks of a chunk whose gates the tokens choose, each alone against NumPy in float64."""

import numpy as np
import pytest
import torch

from effattn_lite.testing import max_error, relative_error

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
import triton.language as tl  # noqa: E402

from effattn_lite.kernels.gated_decay_chunk import channel_scores, head_sums  # noqa: E402

MIXED = (0.0, -1e-6, -1.0, -20.0, -200.0)

pytestmark = pytest.mark.usefixtures("nan_empty")


def between(g, shift=0):
    """Sums of g [n, ...] over j < r <= i - shift, in float64: [i, j, ...]."""
    n = len(g)
    rows = [[g[j + 1 : i + 1 - shift].sum(0, dtype=float) for j in range(n)] for i in range(n)]
    return np.array(rows)


@triton.jit
def _head_kernel(g, since, left, total, D, n, C: tl.constexpr, REVERSE: tl.constexpr):
    o_c = tl.arange(0, C)
    b_since, b_left, b_total, b_D = head_sums(g, 1, n, C, REVERSE)
    tl.store(since + o_c, b_since)
    tl.store(left + o_c, b_left)
    tl.store(total, b_total)
    tl.store(D + o_c[:, None] * C + o_c[None, :], b_D)


@pytest.mark.parametrize("reverse", (False, True))
def test_sums_keep_their_digits(reverse, device):
    """Gates of -20 nats before weak ones: a difference of plain float32 sums is wrong in the fifth digit."""
    C, n = 64, 61
    g = np.where(np.arange(n) < 40, -20.0, -1e-3).astype(np.float32)
    g[7::9] = -np.inf
    since, left, D = (torch.empty(*shape, device=device) for shape in ((C,), (C,), (C, C)))
    total = torch.empty(1, device=device)
    _head_kernel[(1,)](torch.tensor(g, device=device), since, left, total, D, n, C=C, REVERSE=reverse)
    want = np.tril(np.exp(between(g)))
    got = (D.T if reverse else D)[:n, :n]
    assert relative_error(got, want) < 1e-6
    # every entry, not the largest alone
    assert max_error(got.clamp(min=1e-30).log(), np.log(np.maximum(want, 1e-30))) < 1e-5
    assert relative_error(left[:n].exp(), np.exp([g[j + 1 :].sum(dtype=float) for j in range(n)])) < 1e-6
    assert total.exp() == 0 and relative_error(since[:n].exp(), np.exp(np.cumsum(g, dtype=float))) < 1e-6


@triton.jit
def _scores_kernel(
    x, y, own, g, A, xd, yd, C: tl.constexpr, K: tl.constexpr, BONUS: tl.constexpr, REVERSE: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    o_ck, o_kc = o_c[:, None] * K + o_k[None, :], o_c[None, :] * K + o_k[:, None]
    b_A, b_xd, b_yd = channel_scores(
        tl.load(x + o_ck), tl.load(y + o_kc), tl.load(own + o_c), tl.load(g + o_ck), tl.load(g + o_kc),
        BONUS, REVERSE, LEVELS,
    )  # fmt: skip
    tl.store(A + o_c[:, None] * C + o_c[None, :], b_A)
    tl.store(xd + o_ck, b_xd)
    tl.store(yd + o_kc, b_yd)


@pytest.mark.parametrize("bonus", (0, 1))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("C", (16, 32, 64))
def test_scores_by_channel(C, reverse, bonus, device):
    """Every pair of tokens, whatever the gates between them; both factors' decays on the way out."""
    rng, K = np.random.default_rng(0), 16
    x, y = rng.normal(size=(2, C, K)).astype(np.float32)
    own = rng.normal(size=C).astype(np.float32)
    c, k = np.indices((C, K))
    g = np.take(MIXED, (c // 5 + k) % len(MIXED)).astype(np.float32)
    lag = np.arange(C)[:, None] - np.arange(C)
    D = np.where((lag > 0)[..., None], np.exp(between(g, bonus)), 0)
    # what is read lies before, with reverse behind
    want = np.einsum("ik,ijk,jk->ij", *((y, D, x) if reverse else (x, D, y)), dtype=float)
    want = (want.T if reverse else want) + np.diag(own)
    A, xd, yd = (torch.empty(*shape, device=device) for shape in ((C, C), (C, K), (C, K)))
    inputs = [torch.tensor(t, device=device) for t in (x, y, own, g)]
    levels = C.bit_length() - 1
    _scores_kernel[(1,)](*inputs, A, xd, yd, C=C, K=K, BONUS=bonus, REVERSE=reverse, LEVELS=levels)
    assert relative_error(A, want) < 1e-6
    since = np.exp(np.cumsum(g, axis=0, dtype=float) - (g if bonus else 0))
    left = np.exp(np.cumsum(g[::-1], axis=0, dtype=float)[::-1] - g)
    assert relative_error(xd, x * (left if reverse else since)) < 1e-6
    assert relative_error(yd, y * (since if reverse else left)) < 1e-6
