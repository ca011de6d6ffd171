"""What is special to landmark attention: the grouped softmax by hand, its limits, retrieval, its gradient."""

import sys

import numpy as np
import pytest
import torch

from effattn_lite.layers.landmark import Landmark
from effattn_lite.ops import landmark, softmax_attention
from effattn_lite.ops.landmark import select
from effattn_lite.reference import landmark as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("landmark", **sizes))


@pytest.mark.parametrize("block_size, top_k", ((49, None), (100, 3)))
def test_reduces_to_softmax_attention(block_size, top_k):
    """A text without a landmark."""
    x = inputs(H=4, HKV=2)
    got = landmark(**x, block_size=block_size, top_k=top_k, return_lse=True)
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_a_landmark_that_sums_its_block_gives_softmax_attention():
    """Keys of a block are alike, its landmark scores log(tokens) higher: all weights are those of softmax."""
    x, n = inputs(T=45, H=4, HKV=2), 8
    x["k"] = x["k"][:, ::9].repeat_interleave(9, dim=1).clone()
    x["q"][..., 0] = 1
    x["k"][:, n::9, :, 0] += np.log(n) * 16**0.5
    kept = [t for t in range(45) if t % 9 != n]
    o, lse = landmark(**x, block_size=n + 1, return_lse=True)
    want = softmax_attention(*(t[:, kept] for t in x.values()), return_lse=True, impl="torch")
    assert relative_error((o[:, kept], lse[:, kept]), want) < RTOL


def test_by_hand():
    """Blocks of two tokens and a landmark; all queries 1, K = 1: scores are the keys."""
    k = torch.tensor([0.0, np.log(3), np.log(2), 0, 5, 5]).view(1, 6, 1, 1).double()
    v = torch.tensor([4.0, 8, 99, 1, 99, 99]).view(1, 6, 1, 1).double()
    o, lse = landmark(torch.ones_like(k), k, v, block_size=3, scale=1.0, return_lse=True)
    # token 3: 1 for itself, 2 for the block, which is shared 1 : 3
    want = [4, (4 + 3 * 8) / 4, (4 + 3 * 8) / 4, (1 * 1 + 2 * (4 + 3 * 8) / 4) / 3]
    assert max_error(o[0, :4, 0, 0], torch.tensor(want)) < 1e-14
    assert max_error(lse[0, :4, 0].exp(), torch.tensor([1.0, 4, 4, 3])) < 1e-14


def test_weights_sum_to_one_and_landmarks_get_none():
    x = inputs(T=50)
    ones = landmark(x["q"], x["k"], torch.ones_like(x["v"]), block_size=7, top_k=3)
    assert max_error(ones, torch.ones_like(ones)) < 1e-12
    x["v"].requires_grad_()
    landmark(**x, block_size=7).sum().backward()
    reached = x["v"].grad.abs().sum((0, 2, 3)) > 0
    assert reached.tolist() == [t % 7 != 6 for t in range(50)]


@pytest.mark.parametrize("top_k", (7, 99))
def test_enough_landmarks_are_all(top_k):
    x = inputs(H=4, HKV=2)
    got = landmark(**x, block_size=6, top_k=top_k, return_lse=True)
    assert relative_error(got, landmark(**x, block_size=6, return_lse=True)) < RTOL


def test_none_retrieved_is_the_own_block():
    x = inputs(T=40, H=1)
    o = landmark(**x, block_size=8, top_k=0)
    first = softmax_attention(*(t[:, 8:15] for t in x.values()), impl="torch")
    assert relative_error(o[:, 8:15], first) < RTOL
    last = softmax_attention(x["q"][:, 15:16], x["k"][:, 8:15], x["v"][:, 8:15], causal=False, impl="torch")
    assert relative_error(o[:, 15:16], last) < RTOL


def test_retrieval_by_hand():
    """Landmarks 1, 3, 2 of blocks of two: ranked by the sign of the query."""
    k = torch.tensor([9.0, 1, -9, 3, 0, 2, 5]).view(1, 7, 1, 1)
    for sign, ranked in ((1.0, [1, 2, 0]), (-1.0, [0, 2, 1])):
        for n in (0, 1, 2, 3, 9):
            chosen = select(torch.full((1, 7, 1, 1), sign), k, block_size=2, top_k=n)
            assert chosen.dtype == torch.int32 and chosen.shape == (1, 7, 1, min(n, 3))
            assert chosen[0, 6, 0].tolist() == ranked[:n] and chosen[0, 1, 0].tolist() == [-1] * min(n, 3)


def test_ties_go_to_the_lower_block():
    zeros = torch.zeros(1, 40, 2, 8)
    assert (select(zeros, zeros, block_size=8, top_k=3)[0, 35:] == torch.tensor([0, 1, 2])).all()


@pytest.mark.parametrize("T", (1, 7, 63))
@pytest.mark.parametrize("H, HKV", ((2, 2), (6, 2), (7, 1), (16, 1)))
@pytest.mark.parametrize("block_size, top_k", ((8, 3), (2, 5), (5, None)))
def test_equals_reference(T, H, HKV, block_size, top_k, monkeypatch):
    x = make_inputs("landmark", T=T, H=H, HKV=HKV)
    monkeypatch.setattr(sys.modules["effattn_lite.ops.landmark"], "QUERY_TILE", 20)
    got = landmark(**to_torch(x), block_size=block_size, top_k=top_k, return_lse=True)
    for form in (reference.quadratic, reference.retrieved):
        assert relative_error(got, form(**x, block_size=block_size, top_k=top_k)) < RTOL
    if top_k:
        chosen = select(torch.tensor(x["q"]), torch.tensor(x["k"]), block_size=block_size, top_k=top_k)
        want = reference.select(x["q"], x["k"], block_size=block_size, top_k=top_k)
        assert np.array_equal(chosen.numpy(), want)


@pytest.mark.parametrize("top_k", (None, 1))
def test_gradient_over_tiles(top_k, monkeypatch):
    """Central differences over several tiles of queries and blocks, through o and lse."""
    monkeypatch.setattr(sys.modules["effattn_lite.ops.landmark"], "QUERY_TILE", 4)
    x = [t.requires_grad_() for t in inputs(B=1, T=11, H=2, HKV=1, K=3, V=2).values()]
    assert torch.autograd.gradcheck(lambda *x: landmark(*x, block_size=3, top_k=top_k, return_lse=True), x)


def test_decoding_is_the_last_row():
    x = inputs(H=4, HKV=2)
    whole = landmark(**x, block_size=7, top_k=2)
    for n in (1, 9):
        last = landmark(x["q"][:, -n:], x["k"], x["v"], block_size=7, top_k=2)
        assert relative_error(last, whole[:, -n:]) < RTOL


def test_layer_in_odd_pieces():
    layer = Landmark(16, 4, block_size=4, top_k=2, kv_heads=2).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


def test_errors():
    x = inputs()
    with pytest.raises(ValueError, match="block_size is 1, expected >= 2"):
        landmark(**x, block_size=1)
    with pytest.raises(ValueError, match="top_k is -1, expected >= 0"):
        landmark(**x, block_size=4, top_k=-1)
    with pytest.raises(ValueError, match="block_size is 1, expected >= 2"):
        select(x["q"], x["k"], block_size=1, top_k=2)
    with pytest.raises(ValueError, match="at least T = 48 tokens as q"):
        landmark(x["q"], x["k"][:, :9], x["v"][:, :9], block_size=4)
    with pytest.raises(NotImplementedError, match="landmark has no kernel"):
        landmark(**x, block_size=4, impl="triton")
