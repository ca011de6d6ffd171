"""What is special to MoBA: its selection by hand, its limits, and what it is blind to."""

import sys

import numpy as np
import pytest
import torch

from effattn_lite.layers.moba import MoBA
from effattn_lite.ops import block_sparse_attention, moba, softmax_attention
from effattn_lite.ops.moba import select
from effattn_lite.reference import moba as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("moba", **sizes))


@pytest.mark.parametrize("block_size, top_k", ((16, 3), (7, 7), (48, 1), (100, 1), (1, 48), (5, 99)))
def test_reduces_to_softmax_attention(block_size, top_k):
    x = inputs(H=4, HKV=2)
    got = moba(**x, block_size=block_size, top_k=top_k, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_own_block_alone():
    """top_k = 1 leaves every block to itself."""
    x = inputs(T=40)
    got = moba(**x, block_size=8, top_k=1, impl="torch")
    pieces = [
        softmax_attention(*(t[:, i : i + 8] for t in x.values()), impl="torch") for i in range(0, 40, 8)
    ]
    assert relative_error(got, torch.cat(pieces, dim=1)) < RTOL


def test_selection_by_hand():
    """Mean keys 1, 3, 2 on one channel: a query of 1 ranks them 1, 2, 0, one of -1 the other way round."""
    k = torch.tensor([0.0, 2, 3, 3, 2, 2, 9]).view(1, 7, 1, 1)
    for sign, ranked in ((1.0, [3, 1, 2, 0]), (-1.0, [3, 0, 2, 1])):
        for n in (1, 2, 3, 4, 9):
            chosen = select(torch.full((1, 7, 1, 1), sign), k, block_size=2, top_k=n)
            assert chosen.shape == (1, 7, 1, min(n, 4))
            assert chosen[0, 6, 0].tolist() == ranked[:n]
            assert chosen[0, 1, 0].tolist() == [0, -1, -1, -1][:n]


def test_ties_go_to_the_lower_block():
    zeros = torch.zeros(1, 40, 2, 8)
    chosen = select(zeros, zeros, block_size=8, top_k=3)
    assert (chosen[0, 35:] == torch.tensor([4, 0, 1])).all()


@pytest.mark.parametrize("sizes", (dict(T=63), dict(T=7), dict(T=96, H=4, HKV=2)), ids=str)
@pytest.mark.parametrize("block_size, top_k", ((8, 3), (5, 4), (1, 6)))
def test_selection_equals_reference(sizes, block_size, top_k):
    x = make_inputs("moba", **sizes)
    want = reference.select(x["q"], x["k"], block_size=block_size, top_k=top_k)
    got = select(torch.tensor(x["q"]), torch.tensor(x["k"]), block_size=block_size, top_k=top_k)
    assert got.dtype == torch.int32
    assert np.array_equal(np.sort(got.numpy(), -1), np.sort(want, -1))


def test_selection_in_tiles(monkeypatch):
    x = inputs(T=50)
    want = select(x["q"], x["k"], block_size=6, top_k=3)
    monkeypatch.setattr(sys.modules["effattn_lite.ops.moba"], "QUERY_TILE", 7)
    assert torch.equal(select(x["q"], x["k"], block_size=6, top_k=3), want)


@pytest.mark.parametrize("edges", ([0, 0, 20, 21, 48], [0, 48], [0, 5, 10, 15, 48, 48]), ids=str)
def test_selection_counts_blocks_from_each_start(edges):
    x = inputs(B=1)
    packed = select(x["q"], x["k"], block_size=5, top_k=3, cu_seqlens=torch.tensor(edges))
    for a, b in zip(edges, edges[1:], strict=False):
        alone = select(x["q"][:, a:b], x["k"][:, a:b], block_size=5, top_k=3)
        n = alone.shape[-1]
        assert torch.equal(packed[:, a:b, :, :n], alone) and (packed[:, a:b, :, n:] == -1).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_selection_and_attention_apart(impl, device):
    x = {n: t.float().to(device) for n, t in inputs(H=4, HKV=2).items()}
    blocks = select(x["q"], x["k"], block_size=8, top_k=3)
    got = block_sparse_attention(
        **x, block_indices=blocks, block_size=8, query_block_size=1, impl=impl, return_lse=True
    )
    assert max_error(got, moba(**x, block_size=8, top_k=3, impl=impl, return_lse=True)) == 0


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_a_block_that_nobody_chose_is_not_seen(impl, device):
    """Block 1 answers every later query worst: its values do not matter, and get no gradient."""
    x = {n: t.float().to(device) for n, t in inputs(B=1, T=40, H=1, K=8, V=8).items()}
    x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    x["k"][:, 8:16] *= -1
    v = x.pop("v").requires_grad_()
    o = moba(**x, v=v, block_size=8, top_k=2, impl=impl)
    o[:, 16:].sum().backward()
    assert (v.grad[:, 8:16] == 0).all() and (v.grad[:, :8].abs().sum() > 0).all()


def test_decoding_is_the_last_row():
    x = inputs()
    whole = moba(**x, block_size=8, top_k=3, impl="torch")
    for n in (1, 9):
        last = moba(x["q"][:, -n:], x["k"], x["v"], block_size=8, top_k=3, impl="torch")
        assert relative_error(last, whole[:, -n:]) < RTOL


def test_gradient_over_blocks():
    """Central differences, where the selection leaves something out and does not change."""
    x = [t.requires_grad_() for t in inputs(B=1, T=9, H=2, HKV=1, K=3, V=2).values()]
    assert (select(x[0], x[1], block_size=2, top_k=2)[0, -1] >= 0).all()
    assert torch.autograd.gradcheck(
        lambda *x: moba(*x, block_size=2, top_k=2, return_lse=True, impl="torch"), x
    )


@pytest.mark.parametrize("name", ("block_size", "top_k"))
def test_errors(name):
    options = dict(block_size=4, top_k=2) | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0, expected >= 1"):
        moba(**inputs(), **options)
    with pytest.raises(ValueError, match=f"{name} is 0, expected >= 1"):
        select(inputs()["q"], inputs()["k"], **options)


def test_layer_in_odd_pieces():
    layer = MoBA(16, 4, block_size=4, top_k=3, kv_heads=2).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL
