"""What is special to SpargeAttn: likeness, what is never judged, and the filter inside the softmax."""

import math

import numpy as np
import pytest
import torch

from effattn_lite.ops import block_sparse_attention, softmax_attention, spargeattn
from effattn_lite.ops.engines import block_select
from effattn_lite.ops.spargeattn import select
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
SIZES = dict(query_block_size=16, block_size=8)


def inputs(**sizes):
    return to_torch(make_inputs("spargeattn", **sizes))


def alike(T=64, spread=0.3, seed=0):
    """Queries and keys of one head whose tokens are alike in every block of 8."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, T // 8, 1, 16, generator=g) + spread * torch.randn(2, T // 8, 8, 16, generator=g)
    q, k = x.double().flatten(1, 2)[:, None, :, None]
    return q, k, torch.randn(1, T, 1, 8, generator=g).double()


def test_reduces_to_softmax_attention():
    x = inputs(H=4, HKV=2)
    got = spargeattn(**x, **SIZES, threshold=1.0, skip=-math.inf, return_lse=True, impl="torch")
    want = softmax_attention(**x, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL
    # the filter alone, where it leaves out weights below exp(-50)
    assert relative_error(spargeattn(**x, **SIZES, threshold=1.0, return_lse=True, impl="torch"), want) < RTOL


@pytest.mark.parametrize("impl, dtype", (("torch", torch.float64), ("triton", torch.float32)))
def test_likeness_is_the_mean_of_all_cosines(impl, dtype, device):
    x = inputs(B=1, T=21, H=2)["k"].to(dtype).to(device)
    x[:, 9] = 0  # a token without direction
    means, like = block_select.block_means(x, 8, impl=impl)
    for n, (a, b) in enumerate(((0, 8), (8, 16), (16, 21))):
        for h in range(2):
            rows = x[0, a:b, h].double().cpu().numpy()
            cosines = [u @ v / ((np.linalg.norm(u) * np.linalg.norm(v)) or 1) for u in rows for v in rows]
            assert max_error(like[0, h, n], np.mean(cosines)) < 1e-6
            assert max_error(means[0, h, n], rows.mean(0)) < 1e-6


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_a_centred_constant_has_no_direction(impl, device):
    """Keys that are all the same leave only rounding when they are centred: no block of them is alike."""
    x = torch.full((1, 24, 1, 8), 0.1, device=device)
    centre = x.mean(1) * (1 + 2**-20)
    assert max_error(block_select.block_means(x, 8, centre=centre, impl=impl)[1], torch.zeros(1, 1, 3)) == 0


@pytest.mark.parametrize("dtype, impl", (("float64", "torch"), ("float32", "triton")))
def test_without_skip_only_the_first_filter(dtype, impl, device):
    x = {n: t.to(device) for n, t in to_torch(make_inputs("spargeattn", dtype=dtype), dtype=dtype).items()}
    options = dict(**SIZES, similarity=0.1, threshold=0.6, impl=impl)
    mask = select(x["q"], x["k"], **options)
    assert 0.1 < mask.float().mean() < 0.7
    want = block_sparse_attention(**x, block_mask=mask, **SIZES, return_lse=True, impl=impl)
    got = spargeattn(**x, **options, skip=-math.inf, return_lse=True)
    assert max_error(got, want) == 0
    # a filter that nothing falls through
    assert relative_error(spargeattn(**x, **options, skip=-1e30, return_lse=True), want) < 1e-5


@pytest.mark.parametrize("skip", (-0.5, -2.0, -6.0))
def test_what_is_left_out_is_small(skip):
    """Each weight left out is at most exp(skip) of its row's largest; the denominator counts it."""
    x = inputs(H=2, T=63)
    options = dict(query_block_size=16, block_size=4, threshold=1.0, return_lse=True, impl="torch")
    x["q"] *= 4
    want, lse = spargeattn(**x, **options, skip=-math.inf)
    got, same = spargeattn(**x, **options, skip=skip)
    assert relative_error(same, lse) < RTOL
    error = max_error(got, want)
    assert 0 < error <= math.exp(skip) * 63 * float(x["v"].abs().max())


@pytest.mark.parametrize("dtype, impl", (("float64", "torch"), ("float32", "triton")))
def test_a_warp_leaves_a_block_out(dtype, impl, device):
    """By hand: block 1 lies 3 nats under block 0 for rows 8 to 11 and over it for row 12."""
    T, BS = 16, 4
    q, k, v = (torch.zeros(1, T, 1, 1, dtype=getattr(torch, dtype), device=device) for _ in range(3))
    q[:, 8:12], q[:, 12] = 1.0, -1.0
    k[:, :4], v[:, 4:8] = 3.0, 1.0
    options = dict(query_block_size=16, block_size=BS, threshold=1.0, scale=1.0, impl=impl)
    full = spargeattn(q, k, v, **options, skip=-math.inf)[0, :, 0, 0]
    for skip, out in ((-2.9, range(8, 12)), (-3.1, ())):
        o = spargeattn(q, k, v, **options, skip=skip)[0, :, 0, 0]
        for t in range(4, T):
            assert abs(float(o[t] - (0 if t in out else full[t]))) < 1e-6, (skip, t)
    assert (full[8:12] > 0.01).all()


@pytest.mark.parametrize("threshold", (0.01, 0.5, 0.9))
def test_first_filter_stays_within_the_threshold(threshold):
    """Blocks whose mass together is within tau of the estimate, at least one; never a later block."""
    q, k, _ = alike()
    chosen = select(q, k, query_block_size=8, block_size=8, threshold=threshold, similarity=0.5, impl="torch")
    centred = k - k.mean(1, keepdim=True)
    q_mean, k_mean = (x[0, :, 0].unflatten(0, (8, 8)).mean(1) for x in (q, centred))
    s = (q_mean @ k_mean.T / 4).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    for i, p in enumerate(s.softmax(-1)):
        order, want, held = p.argsort(descending=True).tolist(), set(), 0.0
        for j in order:
            held += float(p[j])
            if held <= threshold or not want:
                want.add(j)
        assert set(chosen[0, 0, i].nonzero()[:, 0].tolist()) == {j for j in want if j <= i}


def test_what_is_not_alike_is_seen():
    q, k, _ = alike()
    options = dict(query_block_size=8, block_size=8, threshold=0.01, similarity=0.5, impl="torch")
    assert (select(q, k, **options).sum(-1) == 1).all()
    g = torch.Generator().manual_seed(1)
    k[:, 16:24] = torch.randn(1, 8, 1, 16, generator=g)
    chosen = select(q, k, **options)[0, 0]
    assert chosen[2:, 2].all() and not chosen[:2, 2].any()
    q[:, 40:48] = torch.randn(1, 8, 1, 16, generator=g)
    chosen = select(q, k, **options)[0, 0]
    assert chosen[5, :6].all() and not chosen[5, 6:].any() and chosen[6].sum() == 2


def test_keeps_most_of_the_weight():
    """On alike blocks a quarter of the pairs holds nearly what the best quarter does."""
    q, k, _ = alike(T=256, spread=0.2)
    q = 3 * q
    chosen = select(q, k, query_block_size=8, block_size=8, threshold=0.9, similarity=0.5, impl="torch")
    s = torch.einsum("bthk,bjhk->bhtj", q, k) / 4
    p = s.masked_fill(torch.ones(256, 256).triu(1).bool(), -torch.inf).softmax(-1)
    mass = p.unflatten(3, (32, 8)).unflatten(2, (32, 8)).sum((3, 5))
    best = mass.sort(-1, descending=True).values.cumsum(-1).gather(-1, chosen.sum(-1, keepdim=True) - 1)
    held = (mass * chosen).sum(-1) / best[..., 0]
    assert chosen.float().mean() < 0.25 and held.mean() > 0.95


def test_gradient():
    x = {n: t.requires_grad_() for n, t in inputs(T=40).items()}
    options = dict(**SIZES, similarity=0.1, threshold=0.6, impl="torch")
    o = spargeattn(**x, **options, skip=-math.inf)
    want = block_sparse_attention(**x, block_mask=select(x["q"], x["k"], **options), **SIZES, impl="torch")
    assert max_error(*(torch.autograd.grad(y.square().sum(), x.values()) for y in (o, want))) == 0
    with pytest.raises(NotImplementedError, match="no gradient; use skip=-inf"):
        spargeattn(**x, **options).sum().backward()


def test_kernels_choose_as_torch_does(device):
    q, k, _ = (t.float().to(device) for t in alike(T=256, spread=1.0))
    options = dict(query_block_size=8, block_size=8, similarity=0.5, threshold=0.7)
    want, got = (select(q, k, **options, impl=impl) for impl in ("torch", "triton"))
    assert (want == got).all() and 0 < want.float().mean() < 0.5


def test_errors():
    x = inputs()
    with pytest.raises(ValueError, match=r"skip is 0.0, expected < 0"):
        spargeattn(**x, skip=0.0)
    with pytest.raises(ValueError, match=r"query_block_size is 0, expected >= 1"):
        spargeattn(**x, query_block_size=0)
    x = {n: t.float() for n, t in x.items()}
    with pytest.raises(NotImplementedError, match=r"a power of two from 4 to 256, got 48"):
        spargeattn(**x, query_block_size=48, impl="triton")
