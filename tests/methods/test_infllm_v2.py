"""What is special to InfLLM-V2: spans and blocks by hand, its limits, groups of heads, dense weights."""

import sys

import numpy as np
import pytest
import torch

from effattn_lite.layers.infllm_v2 import InfLLMV2
from effattn_lite.layers.softmax_attention import SoftmaxAttention
from effattn_lite.ops import block_sparse_attention, infllm_v2, moba, softmax_attention
from effattn_lite.ops.infllm_v2 import select
from effattn_lite.reference import infllm_v2 as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
SMALL = dict(block_size=8, top_k=2, init_blocks=1, local_blocks=2, kernel_size=4, kernel_stride=2)


def inputs(**sizes):
    return to_torch(make_inputs("infllm_v2", **sizes))


@pytest.mark.parametrize("top_k, local_blocks", ((4, 2), (1, 5), (99, 1), (1, 99)))
def test_reduces_to_softmax_attention(top_k, local_blocks):
    x, options = inputs(H=4, HKV=2), SMALL | dict(top_k=top_k, local_blocks=local_blocks)
    got = infllm_v2(**x, **options, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("top_k", (1, 3))
def test_reduces_to_moba(top_k):
    """A span a block, a head a group, no block but the own one for certain."""
    x = inputs(H=3, T=60)
    options = dict(block_size=8, top_k=top_k, init_blocks=0, local_blocks=1, kernel_size=8, kernel_stride=8)
    got = infllm_v2(**x, **options, return_lse=True, impl="torch")
    want = moba(**x, block_size=8, top_k=top_k + 1, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


def test_spans_of_a_block():
    """Blocks of 64, spans of 32, strides of 16: five spans overlap a block, of the first only four exist."""
    p = np.eye(12)  # the weight of one span each
    score = reference.block_scores(p, 3)
    assert [np.flatnonzero(score[:, j]).tolist() for j in range(3)] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6, 7],
        [7, 8, 9, 10, 11],
    ]
    for i in range(12):  # the same from the tokens: span i holds 16 i .. 16 i + 31
        overlaps = [16 * i < 64 * (j + 1) and 16 * i + 32 > 64 * j for j in range(3)]
        assert (score[i] > 0).tolist() == overlaps


def test_selection_by_hand():
    """One channel, spans of 2 every token, blocks of 2: a pair of large keys lifts all blocks it touches."""
    k = torch.tensor([0.0, 0, 0, 9, 9, 0, 0, 0, 0, 0, 0]).view(1, 11, 1, 1)
    options = dict(block_size=2, init_blocks=0, local_blocks=1, kernel_size=2, kernel_stride=1)
    q = torch.ones_like(k)
    for top_k, want in ((0, [5]), (1, [1, 5]), (2, [1, 2, 5]), (3, [0, 1, 2, 5])):
        assert sorted(select(q, k, top_k=top_k, **options)[0, 10, 0].tolist()) == want
    # a large first block is not needed to be read, an init block is
    assert sorted(select(q, k, top_k=1, **options | dict(init_blocks=1))[0, 10, 0].tolist()) == [0, 5]
    # at token 4 the pair has just ended, and the own block is local
    assert sorted(select(q, k, top_k=1, **options)[0, 4, 0].tolist()) == [1, 2]
    # at token 1 there is nothing but the own block
    assert sorted(select(q, k, top_k=1, **options)[0, 1, 0].tolist()) == [-1, 0]


def test_a_group_votes_with_its_weights():
    """Two heads weakly for block 2, one strongly for block 1: shares are summed, not products."""
    k = torch.zeros(1, 9, 1, 2)
    k[0, 2:4, 0, 0], k[0, 4:6, 0, 1] = 3.0, 3.0
    options = dict(
        block_size=2, top_k=1, init_blocks=0, local_blocks=1, kernel_size=2, kernel_stride=2, scale=1.0
    )
    strong, weak = torch.tensor([50.0, 0]), torch.tensor([0, 1.0])
    q = torch.stack((strong, weak, weak)).view(1, 1, 3, 2)
    assert select(q, k, **options)[0, 0, 0, 1] == 2
    assert select(q[:, :, :2], k, **options)[0, 0, 0, 1] == 1


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_ties_go_to_the_lower_block(impl, device):
    """Equal keys, odd lengths: all spans weigh the same."""
    q, k = torch.randn(1, 51, 2, 8, device=device), torch.ones(1, 51, 2, 8, device=device) / 3
    chosen = select(q, k, **SMALL | dict(top_k=3)).sort(dim=-1)[0]
    assert (chosen[0, 48:].cpu() == torch.tensor([0, 1, 2, 5, 6])).all()
    assert infllm_v2(q, k, k, **SMALL, impl=impl).isfinite().all()


@pytest.mark.parametrize("T", (1, 3, 7, 63))
@pytest.mark.parametrize("H, HKV", ((2, 2), (6, 2), (7, 1), (16, 1)))
@pytest.mark.parametrize(
    "options",
    (SMALL, dict(block_size=6, top_k=3, init_blocks=2, local_blocks=1, kernel_size=9, kernel_stride=3)),
    ids=str,
)
def test_equals_reference(T, H, HKV, options, monkeypatch):
    x = make_inputs("infllm_v2", T=T, H=H, HKV=HKV)
    monkeypatch.setattr(sys.modules["effattn_lite.ops.infllm_v2"], "QUERY_TILE", 20)
    want = reference.select(x["q"], x["k"], **options)
    got = select(torch.tensor(x["q"]), torch.tensor(x["k"]), **options)
    assert got.dtype == torch.int32 and np.array_equal(got.numpy(), want)
    o = infllm_v2(**to_torch(x), **options, impl="torch", return_lse=True)
    for form in (reference.quadratic, reference.gathered):
        assert relative_error(o, form(**x, **options)) < RTOL


def test_defaults_are_the_papers():
    """At 8,192 tokens a query reads 64 blocks beside 32 local ones, the first among the 64."""
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 8192, 1, 4)
    chosen = select(q, k)[0, 0, 0]
    assert chosen.numel() == 96 and chosen.unique().numel() == 96
    assert 0 in chosen and set(range(96, 128)) <= set(chosen.tolist())


def test_selection_counts_from_each_start():
    x = inputs(B=1)
    edges = [0, 0, 20, 21, 48]
    packed = select(x["q"], x["k"], **SMALL, cu_seqlens=torch.tensor(edges))
    for a, b in zip(edges, edges[1:], strict=False):
        alone = select(x["q"][:, a:b], x["k"][:, a:b], **SMALL)
        n = alone.shape[-1]
        assert torch.equal(packed[:, a:b, :, :n], alone) and (packed[:, a:b, :, n:] == -1).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_selection_and_attention_apart(impl, device):
    x = {n: t.float().to(device) for n, t in inputs(H=6, HKV=2).items()}
    blocks = select(x["q"], x["k"], **SMALL)
    got = block_sparse_attention(
        **x, block_indices=blocks, block_size=8, query_block_size=1, impl=impl, return_lse=True
    )
    assert max_error(got, infllm_v2(**x, **SMALL, impl=impl, return_lse=True)) == 0


def test_gradient_over_blocks():
    """Central differences, where the selection leaves something out and does not change."""
    x = [t.requires_grad_() for t in inputs(B=1, T=11, H=2, HKV=1, K=3, V=2).values()]
    options = dict(block_size=2, top_k=1, init_blocks=1, local_blocks=2, kernel_size=2, kernel_stride=1)
    assert select(x[0], x[1], **options).shape[-1] == 3
    assert torch.autograd.gradcheck(lambda *x: infllm_v2(*x, **options, return_lse=True, impl="torch"), x)


def test_decoding_is_the_last_row():
    x = inputs(H=4, HKV=2)
    whole = infllm_v2(**x, **SMALL, impl="torch")
    for n in (1, 9):
        last = infllm_v2(x["q"][:, -n:], x["k"], x["v"], **SMALL, impl="torch")
        assert relative_error(last, whole[:, -n:]) < RTOL


def test_dense_weights_fit():
    """The layer adds no parameter: where its blocks hold the text, it is the dense layer."""
    dense, sparse = (
        SoftmaxAttention(32, 4, kv_heads=2).double(),
        InfLLMV2(32, 4, kv_heads=2, **SMALL).double(),
    )
    sparse.load_state_dict(dense.state_dict(), strict=True)
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    short = sparse(x[:, :32])
    assert relative_error(short, dense(x[:, :32])) < RTOL
    assert relative_error(sparse(x)[:, :32], short) < RTOL and relative_error(sparse(x), dense(x)) > 1e-3


def test_layer_in_odd_pieces():
    layer = InfLLMV2(16, 4, kv_heads=2, **SMALL).double()
    x, cache, parts = torch.randn(2, 61, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 29, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


@pytest.mark.parametrize(
    "wrong, match",
    (
        (dict(kernel_stride=0), "kernel_stride is 0, expected >= 1"),
        (dict(local_blocks=0), "local_blocks is 0, expected >= 1"),
        (dict(init_blocks=3), "init_blocks is 3, expected 0 to top_k = 2"),
        (dict(block_size=7), "block_size is 7, expected a multiple of kernel_stride = 2"),
        (dict(kernel_size=3), "kernel_size is 3, expected a multiple of kernel_stride = 2"),
    ),
    ids=str,
)
def test_errors(wrong, match):
    x = inputs()
    with pytest.raises(ValueError, match=match):
        infllm_v2(**x, **SMALL | wrong)
    with pytest.raises(ValueError, match=match):
        select(x["q"], x["k"], **SMALL | wrong)
