"""What is special to MInference: sums along columns and diagonals, their union, and the pattern of blocks."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import block_sparse_attention, minference, softmax_attention, streaming_llm
from effattn_lite.ops.engines import block_select
from effattn_lite.ops.engines.vertical_slash import attend
from effattn_lite.ops.minference import select, select_blocks
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
RUNS = (("torch", "float64", 1e-10), ("triton", "float32", 1e-5))


def inputs(*, dtype="float64", device="cpu", **sizes):
    made = to_torch(make_inputs("minference", dtype=dtype, **sizes), dtype=dtype)
    return {name: x.to(device) for name, x in made.items()}


@pytest.mark.parametrize("impl, dtype, tolerance", RUNS)
def test_reduces_to_softmax_attention(impl, dtype, tolerance, device):
    x = inputs(H=4, HKV=2, T=70, dtype=dtype, device=device)
    want = softmax_attention(**x, return_lse=True, impl="torch")
    for sizes in (dict(columns=70, diagonals=3), dict(columns=2, diagonals=70)):
        got = minference(**x, **sizes, sinks=1, window=1, return_lse=True, impl=impl)
        assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("impl, dtype, tolerance", RUNS)
def test_reduces_to_streaming_llm(impl, dtype, tolerance, device):
    """Nothing but what is always kept: the A shape."""
    x = inputs(T=70, dtype=dtype, device=device)
    got = minference(**x, columns=5, diagonals=9, sinks=5, window=9, return_lse=True, impl=impl)
    want = streaming_llm(**x, sinks=5, window=9, return_lse=True, impl="torch")
    assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("impl, dtype, tolerance", RUNS)
@pytest.mark.parametrize("T, last", ((45, 7), (40, 64), (100, 16)))
def test_sums_of_the_last_queries(T, last, impl, dtype, tolerance, device):
    """Entry by entry."""
    x = inputs(B=1, T=T, H=2, K=8, dtype=dtype, device=device)
    columns, diagonals = block_select.last_query_sums(x["q"], x["k"], last=last, scale=0.5, impl=impl)
    for h in range(2):
        q, k = (x[n][0, :, h].double().cpu().numpy() for n in "qk")
        want = np.zeros((2, T))
        for t in range(max(T - last, 0), T):
            p = np.exp(0.5 * q[t] @ k[: t + 1].T)
            for j, weight in enumerate(p / p.sum()):
                want[0, j] += weight
                want[1, t - j] += weight
        assert max_error(columns[0, h], want[0]) < tolerance
        assert max_error(diagonals[0, h], want[1]) < tolerance


def planted(T=160):
    """Queries that see columns 21 and 77, and the keys 50 tokens back."""
    g, t = torch.Generator().manual_seed(0), torch.arange(T)
    wave = torch.randn(T, 12, generator=g)
    wave = 7 * wave / wave.norm(dim=-1, keepdim=True)
    k = torch.cat((wave, 9.0 * ((t == 21) | (t == 77))[:, None].expand(T, 4)), -1)
    q = torch.cat((wave.roll(50, 0), torch.full((T, 4), 1.3)), -1)
    return (x.double()[None, :, None] for x in (q, k, torch.randn(T, 8, generator=g)))


def test_finds_columns_and_diagonals():
    q, k, v = planted()
    options = dict(columns=4, diagonals=4, sinks=2, window=3, last_queries=32, impl="torch")
    columns, diagonals = select(q, k, **options)
    assert {0, 1, 21, 77} == set(columns[0, 0].tolist()) and {0, 1, 2, 50} == set(diagonals[0, 0].tolist())
    _, lse = minference(q, k, v, **options, return_lse=True)
    _, full = softmax_attention(q, k, v, return_lse=True, impl="torch")
    # exp of the difference is the share of the weight that the pattern holds
    assert (lse - full)[0, 80:].exp().mean() > 0.97


def test_of_equal_weights_the_lowest_number_is_taken():
    x = inputs(B=1, T=64, H=1)
    options = dict(columns=6, diagonals=5, sinks=0, window=0, last_queries=8, impl="torch")
    columns, diagonals = select(x["q"], torch.zeros_like(x["k"]), **options)
    assert columns.tolist() == [[[*range(6)]]] and diagonals.tolist() == [[[*range(5)]]]


@pytest.mark.parametrize("impl, dtype, tolerance", RUNS)
def test_a_pair_counts_once(impl, dtype, tolerance, device):
    """Row by row: the union of a head's columns and diagonals, in any order, some numbers twice or absent."""
    x = inputs(B=2, T=75, H=4, HKV=2, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(0)
    columns = torch.randint(-1, 75, (2, 4, 13), generator=g)
    diagonals = torch.cat(
        (torch.randint(-1, 75, (2, 4, 9), generator=g), torch.tensor([4, 4, 5]).expand(2, 4, 3)), -1
    )
    o, lse = attend(**x, columns=columns.to(device), diagonals=diagonals.to(device), impl=impl)
    x = {name: t.double().cpu() for name, t in x.items()}
    empty = 0
    for b, h, t in np.ndindex(2, 4, 75):
        seen = {c for c in columns[b, h].tolist() if 0 <= c <= t}
        seen |= {t - d for d in diagonals[b, h].tolist() if 0 <= d <= t}
        if not seen:
            empty += 1
            assert lse[b, t, h] == -torch.inf and not o[b, t, h].any()
            continue
        j = sorted(seen)
        s = x["k"][b, j, h // 2] @ x["q"][b, t, h] / 4
        assert max_error(lse[b, t, h], s.logsumexp(0)) < tolerance
        assert max_error(o[b, t, h], s.softmax(0) @ x["v"][b, j, h // 2]) < tolerance
    assert empty


@pytest.mark.parametrize("impl, dtype, tolerance", RUNS)
def test_pattern_of_blocks(impl, dtype, tolerance, device):
    x = inputs(B=1, T=45, H=2, HKV=1, dtype=dtype, device=device)
    index = select_blocks(x["q"], x["k"], top_k=3, block_size=8, impl=impl)
    assert index.shape == (1, 6, 2, 3)
    q, k = (x[n].double().cpu() for n in "qk")
    for i, h in np.ndindex(6, 2):
        scores = [
            float(q[0, 8 * i : 8 * i + 8, h].mean(0) @ k[0, 8 * j : 8 * j + 8, 0].mean(0))
            for j in range(i + 1)
        ]
        want = set(np.argsort(scores)[::-1][:3].tolist()) | ({-1} if i < 2 else set())
        assert set(index[0, i, h].tolist()) == want
    o = block_sparse_attention(**x, block_indices=index, block_size=8, impl=impl)
    every = select_blocks(x["q"], x["k"], top_k=6, block_size=8, impl=impl)
    full = block_sparse_attention(**x, block_indices=every, block_size=8, impl=impl)
    assert relative_error(full, softmax_attention(**x, impl="torch")) < tolerance < max_error(o, full)


def test_no_gradient():
    x = {n: t.requires_grad_() for n, t in inputs().items()}
    with pytest.raises(NotImplementedError, match="no gradient"):
        minference(**x, columns=5, diagonals=5, impl="torch").sum().backward()


def test_kernels_choose_as_torch_does(device):
    x = inputs(B=1, T=300, H=4, HKV=2, dtype="float32", device=device)
    options = dict(columns=40, diagonals=25, sinks=3, window=3, last_queries=48)
    want, got = (select(x["q"], x["k"], **options, impl=impl) for impl in ("torch", "triton"))
    assert all((a == b).all() for a, b in zip(want, got, strict=True))


def test_errors():
    x = inputs()
    with pytest.raises(ValueError, match=r"columns is -1, expected >= 0"):
        minference(**x, columns=-1)
    with pytest.raises(ValueError, match=r"last_queries is 0, expected >= 1"):
        minference(**x, last_queries=0)
    x = {n: t.float() for n, t in x.items()}
    with pytest.raises(NotImplementedError, match=r"last_queries <= 128, got 200"):
        minference(**x, last_queries=200, impl="triton")
