"""What is special to XAttention: antidiagonal sums, the fewest blocks that reach the threshold, ties."""

from itertools import combinations

import numpy as np
import pytest
import torch

from effattn_lite.ops import block_sparse_attention, softmax_attention, xattention
from effattn_lite.ops.engines import block_select
from effattn_lite.ops.xattention import select
from effattn_lite.reference import xattention as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("xattention", **sizes))


def weights(x):
    """The true softmax, [B, H, T, T]."""
    T, K = x["q"].shape[1], x["q"].shape[3]
    s = torch.einsum("bthk,bjhk->bhtj", x["q"], x["k"]) * K**-0.5
    return s.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


def test_reduces_to_softmax_attention():
    x = inputs(H=4, HKV=2)
    got = xattention(**x, block_size=8, stride=4, threshold=1.0, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("impl, dtype, tolerance", (("torch", "float64", 1e-12), ("triton", "float32", 1e-5)))
@pytest.mark.parametrize("T, block_size, stride", ((48, 16, 4), (45, 8, 8), (50, 12, 3)))
def test_masses_are_those_of_antidiagonal_sums(T, block_size, stride, impl, dtype, tolerance, device):
    """Tile by tile, entry by entry; beyond the last token scores are 0."""
    if impl == "triton" and block_size // stride == 4 and stride == 3:
        block_size = 6  # a power of two of tiles
    x, S = make_inputs("xattention", B=1, T=T, H=1, K=8, dtype="float32"), stride
    R = -(-T // S)
    s = np.zeros((R * S, R * S))
    s[:T, :T] = 8**-0.5 * x["q"][0, :, 0].astype(float) @ x["k"][0, :, 0].astype(float).T
    a = np.full((R, R), -np.inf)
    for i in range(R):
        for j in range(i + 1):
            a[i, j] = sum(s[i * S + S - 1 - u, j * S + u] for u in range(S)) / S
    p = np.exp(a - a.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    n, NQ = block_size // S, -(-T // block_size)
    want = [[p[i * n : i * n + n, j * n : j * n + n].sum() for j in range(NQ)] for i in range(NQ)]
    q, k = (t.to(device) for t in list(to_torch(x, dtype=dtype).values())[:2])
    mass = block_select.antidiagonal_mass(q, k, block_size=block_size, stride=S, scale=8**-0.5, impl=impl)
    assert max_error(mass[0, 0], want) < tolerance


@pytest.mark.parametrize("threshold", (0.1, 0.5, 0.9))
def test_no_fewer_blocks_reach_the_threshold(threshold):
    rng = np.random.default_rng(0)
    mass = rng.exponential(size=(20, 7)) ** 2
    always = np.arange(7) == rng.integers(7, size=(20, 1))
    chosen = reference.top_mass(mass, threshold, always)
    need = threshold * mass.sum(1, keepdims=True)
    same = block_select.top_mass(torch.tensor(mass), torch.tensor(need), torch.tensor(always))
    assert (same.numpy() == chosen).all()
    for row, always_here, taken, least in zip(mass, always, chosen, need[:, 0], strict=True):
        assert taken[always_here].all() and row[taken].sum() >= least
        others = np.flatnonzero(~always_here)
        for fewer in range(taken.sum() - 1):
            assert all(
                row[always_here].sum() + row[list(c)].sum() < least for c in combinations(others, fewer)
            )


def test_of_equal_blocks_the_lowest_is_taken():
    x = inputs(B=1, T=64, H=1)
    x["k"] = torch.zeros_like(x["k"])
    chosen = select(x["q"], x["k"], block_size=8, stride=4, threshold=0.45, impl="torch")[0, 0]
    for i, row in enumerate(chosen):
        taken = row.nonzero()[:, 0].tolist()
        # the first block, the query's own, and others from the lowest on
        assert {0, i} <= set(taken) and sorted({*taken} - {i})[: len(taken)] == [*range(len({*taken} - {i}))]
    assert 3 < chosen[7].sum() < 6


def test_rounding_breaks_no_tie():
    """Masses that differ as sums in another order do are equal; those that differ by a thousandth are not."""
    noise = 1e-6 * np.random.default_rng(0).normal(size=(200, 12))
    nearly = 0.3 * (1 + noise)
    assert (block_select.order(torch.tensor(nearly)) == torch.arange(12)).all()
    chosen = reference.top_mass(nearly, 0.5, np.zeros(nearly.shape, bool))
    assert (np.diff(chosen.astype(int)) <= 0).all() and (chosen.sum(1) <= 7).all()
    rising = 0.3 * 1.001 ** np.arange(12)
    assert block_select.order(torch.tensor(rising)).tolist() == [*range(12)][::-1]


def scores(see):
    """Queries and keys whose scores are 40 where `see` [T, T] is true, and 0 elsewhere."""
    T = len(see)
    q = 40 * T**0.5 * see.double()[None, :, None]
    return q, torch.eye(T).double()[None, :, None]


@pytest.mark.parametrize("kind", ("columns", "odd diagonal"))
def test_finds_columns_and_diagonals(kind):
    """The blocks hold nearly the weight that as many of the best blocks hold."""
    t = torch.arange(128)
    see = (t % 50 == 37).expand(128, 128) if kind == "columns" else t[:, None] - t == 41
    q, k = scores(see)
    chosen = select(q, k, block_size=8, stride=4, threshold=0.8, impl="torch")[0, 0]
    mass = weights({"q": q, "k": k})[0, 0].unflatten(1, (16, 8)).unflatten(0, (16, 8)).sum((1, 3))
    best = mass.sort(-1, descending=True).values.cumsum(-1).gather(-1, chosen.sum(-1, keepdim=True) - 1)
    held = (mass * chosen).sum(-1) / best[:, 0]
    assert chosen.float().mean() < 0.35 and held[6:].min() > 0.9
    if kind == "columns":
        assert chosen[5:, 4].all() and chosen[11:, 10].all()
    else:  # it crosses the blocks 5 and 6 back
        assert all(chosen[i, i - 5] for i in range(6, 16))


@pytest.mark.parametrize("stride, blind", ((4, True), (8, True), (3, False)))
def test_even_strides_do_not_see_even_diagonals(stride, blind):
    """Row plus column of a sampled score is -1 modulo the stride, so with an even one t - j is odd."""
    t, size = torch.arange(120), 24
    q, k = scores(t[:, None] - t == 40)
    options = dict(block_size=size, stride=stride, scale=120**-0.5, impl="torch")
    seen, nothing = (block_select.antidiagonal_mass(x, k, **options) for x in (q, torch.zeros_like(q)))
    assert (max_error(seen, nothing) == 0) == blind


def test_gradient_flows_through_the_attention_alone():
    x = {n: t.requires_grad_() for n, t in inputs(T=40).items()}
    options = dict(block_size=8, stride=4, threshold=0.5, impl="torch")
    mask = select(x["q"], x["k"], **options)
    assert not mask.requires_grad and not mask.all()
    outputs = (
        xattention(**x, **options),
        block_sparse_attention(**x, block_mask=mask, block_size=8, impl="torch"),
    )
    grads = [torch.autograd.grad(o.square().sum(), x.values()) for o in outputs]
    assert max_error(*grads) == 0


@pytest.mark.parametrize("threshold", (0.31, 0.9))
def test_kernel_chooses_as_torch_does(threshold, device):
    q, k, _ = (t.float().to(device) for t in inputs(B=1, T=300, H=4, HKV=2).values())
    options = dict(block_size=16, stride=4, threshold=threshold)
    want, got = (select(q, k, **options, impl=impl) for impl in ("torch", "triton"))
    assert (want == got).all()


def test_errors():
    x = inputs()
    with pytest.raises(ValueError, match=r"block_size is 12, expected a multiple of stride = 8"):
        xattention(**x, block_size=12)
    with pytest.raises(ValueError, match=r"stride is 0, expected >= 1"):
        xattention(**x, stride=0)
    x = {n: t.float() for n, t in x.items()}
    with pytest.raises(NotImplementedError, match=r"power of two up to 64, got 3"):
        xattention(**x, block_size=12, stride=4, impl="triton")
