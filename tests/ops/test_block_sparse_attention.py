"""Block-sparse attention in plain torch, float64, against one masked softmax."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import block_sparse_attention, block_streaming, softmax_attention
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
SIZES = dict(B=2, T=63, H=4, HKV=2, K=8, V=12)
# block_size, query_block_size, causal
BLOCKS = [
    (8, 8, True),
    (8, 16, True),
    (20, 7, True),
    (16, 1, True),
    (64, 64, True),
    (8, 16, False),
    (5, 1, False),
]


def draw(**sizes):
    """q, k, v as float64 tensors that want gradients."""
    inputs = make_inputs("softmax_attention", **SIZES | sizes, dtype="float64")
    return tuple(to_torch({n: inputs[n] for n in "qkv"}, requires_grad=True).values())


def draw_sets(NQ, NK, HS, B=2, n=3, seed=0):
    """Block numbers with holes, in any order, some twice, one row of none, and the same as a mask."""
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, NK, size=(B, NQ, HS, n))
    index[:, NQ // 2] = -1
    mask = (index[..., None] == np.arange(NK)).any(3)  # [B, NQ, HS, NK]
    return torch.tensor(index), torch.tensor(mask).transpose(1, 2)


def masked_softmax(q, k, v, mask, BS, QS, causal):
    """By the definition: (o, lse), every pair of tokens at once."""
    (H, K), t = q.shape[2:], torch.arange(q.shape[1])
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    see = mask.repeat_interleave(H // mask.shape[1], 1)[:, :, t // QS][..., t // BS]
    see = see & (t <= t[:, None]) if causal else see
    s = (torch.einsum("bthk,bjhk->bhtj", q, k) * K**-0.5).masked_fill(~see, -torch.inf)
    p = torch.softmax(s, -1).nan_to_num(0.0)
    return torch.einsum("bhtj,bjhv->bthv", p, v), torch.logsumexp(s, -1).transpose(1, 2)


def grads(out, x):
    """Gradients from fixed cotangents on o and lse; where nothing is seen lse has none."""
    generator = torch.Generator().manual_seed(1)
    do, dlse = (torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in out)
    o, lse = out[0], torch.where(out[1].isfinite(), out[1], 0.0)
    return torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), x, retain_graph=True)


@pytest.mark.parametrize("HS", (2, 4))
@pytest.mark.parametrize("BS, QS, causal", BLOCKS)
def test_equals_a_masked_softmax(BS, QS, causal, HS):
    x = draw()
    index, mask = draw_sets(-(-63 // QS), -(-63 // BS), HS)
    want = masked_softmax(*x, mask, BS, QS, causal)
    options = dict(block_size=BS, query_block_size=QS, causal=causal, return_lse=True, impl="torch")
    for sets in (dict(block_indices=index), dict(block_indices=index.int()), dict(block_mask=mask)):
        got = block_sparse_attention(*x, **sets, **options)
        assert relative_error(got, want) < RTOL
        assert all(relative_error(a, b) < RTOL for a, b in zip(grads(got, x), grads(want, x), strict=True))
    assert not got[1].isfinite().all(), "some row must see nothing"


def test_what_stands_in_a_row_of_indices():
    """Order, holes, repetitions and blocks without tokens change nothing."""
    x = draw(B=1, H=2)
    rows = [[0, 2], [2, 0], [2, 2, 0, 2], [-1, 2, -1, 0], [8, 0, 2, 99]]
    outputs = []
    for row in rows:
        index = torch.tensor(row).expand(1, 8, 2, len(row))
        outputs.append(block_sparse_attention(*x, block_indices=index, block_size=8, causal=False))
    assert all(torch.equal(o, outputs[0]) for o in outputs)
    nothing = block_sparse_attention(*x, block_indices=index[..., :0], block_size=8, return_lse=True)
    assert (nothing[0] == 0).all() and (nothing[1] == -torch.inf).all()


def test_by_hand():
    """Three tokens, blocks of two; the third sees the first block only: the mean of its values."""
    q = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64).view(1, 3, 1, 1)
    index = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    o, lse = block_sparse_attention(q, q, v, block_indices=index, block_size=2, return_lse=True)
    assert o.flatten().tolist() == [1.0, 2.0, 2.0]
    assert max_error(lse.exp().flatten(), torch.tensor([1.0, 2.0, 2.0])) < RTOL


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("QS", (1, 16))
def test_all_blocks_are_softmax_attention(QS, causal):
    x = draw()
    mask = torch.ones(2, 2, -(-63 // QS), 8, dtype=torch.bool)
    options = dict(causal=causal, return_lse=True, scale=-0.3)
    got = block_sparse_attention(*x, block_mask=mask, block_size=8, query_block_size=QS, **options)
    assert relative_error(got, softmax_attention(*x, **options)) < RTOL


def test_sinks_and_last_blocks_are_block_streaming():
    x = draw()
    i, j = np.ogrid[:8, :8]
    mask = torch.tensor((j < 1) | (j > i - 2)).expand(2, 2, 8, 8)
    got = block_sparse_attention(*x, block_mask=mask, block_size=8, return_lse=True)
    want = block_streaming(*x, sink_blocks=1, local_blocks=2, block_size=8, return_lse=True)
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("QS", (1, 8, 24))
def test_packed_sequences(QS):
    """Sequences laid end to end give what each gives alone; what the sets have beyond them is ignored."""
    x = draw(B=1, H=2, HKV=1)
    edges = torch.tensor([0, 17, 17, 18, 63])
    rows = (-(-edges.diff() // QS)).cumsum(0).tolist()
    index, mask = draw_sets(rows[-1] + 2, 9, 1, B=1)
    options = dict(block_size=8, query_block_size=QS, return_lse=True)
    got = block_sparse_attention(*x, block_indices=index, cu_seqlens=edges, **options)
    same = block_sparse_attention(*x, block_mask=mask, cu_seqlens=edges, **options)
    assert max_error(got, same) == 0
    packed = grads(got, x)
    for a, b, first, last in zip(edges, edges[1:], (0, *rows), rows, strict=False):
        alone = tuple(t[:, a:b].detach().requires_grad_() for t in x)
        want = block_sparse_attention(*alone, block_indices=index[:, first:last], **options)
        assert relative_error(tuple(y[:, a:b] for y in got), want) < RTOL
        o, lse = torch.zeros_like(got[0]), torch.zeros_like(got[1])
        o[:, a:b], lse[:, a:b] = want
        for mine, whole in zip(grads((o, lse), alone), packed, strict=True):
            assert max_error(mine, whole[:, a:b]) < RTOL


@pytest.mark.parametrize("QS", (1, 2))
def test_gradient(QS):
    """Central differences in float64, through o and lse."""
    x = draw(B=1, T=5, H=2, HKV=1, K=3, V=2)
    # the token itself is always seen, so that lse is finite
    mask = draw_sets(-(-5 // QS), 3, 2, B=1)[1].clone()
    i = torch.arange(mask.shape[2])
    mask[:, :, i, i * QS // 2] = True
    options = dict(block_mask=mask, block_size=2, query_block_size=QS, return_lse=True)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, **options), x)


@pytest.mark.parametrize("size", (dict(T=0), dict(B=0)), ids=str)
def test_nothing_in_nothing_out(size):
    x = draw(**size)
    B, T = x[0].shape[:2]
    index = torch.zeros(B, -(-T // 8), 2, 3, dtype=torch.int64)
    o, lse = block_sparse_attention(*x, block_indices=index, block_size=8, return_lse=True)
    assert o.shape == (B, T, 4, 12) and lse.shape == (B, T, 4)
    (o.sum() + lse.sum()).backward()
    assert all(t.grad.shape == t.shape for t in x)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(block_indices=None), ValueError, "exactly one of block_indices and block_mask, got neither"),
        (dict(block_mask=torch.ones(2, 2, 8, 8, dtype=torch.bool)), ValueError, "got both"),
        (dict(block_indices=torch.zeros(2, 7, 2, 3, dtype=torch.int64)), ValueError, "NQ = 7, expected .* 8"),
        (
            dict(block_indices=torch.zeros(2, 8, 3, 3, dtype=torch.int64)),
            ValueError,
            "3 heads, expected k's 2",
        ),
        (dict(block_indices=torch.zeros(2, 8, 2, dtype=torch.int64)), ValueError, "4 axes .B, NQ, HS, n."),
        (
            dict(block_indices=torch.zeros(2, 8, 2, 3)),
            TypeError,
            "float32, expected torch.int32 or torch.int64",
        ),
        (
            dict(block_indices=None, block_mask=torch.ones(2, 2, 8, 9, dtype=torch.bool)),
            ValueError,
            "NK = 9, expected .* 8",
        ),
        (
            dict(block_indices=None, block_mask=torch.ones(2, 2, 8, 8)),
            TypeError,
            "block_mask is torch.float32, expected torch.bool",
        ),
        (dict(block_size=0), ValueError, "block_size is 0, expected >= 1"),
        (dict(query_block_size=-1), ValueError, "query_block_size is -1, expected >= 1"),
    ],
    ids=str,
)
def test_errors_name_both_sides(change, error, words):
    index = torch.zeros(2, 8, 2, 3, dtype=torch.int64)
    with pytest.raises(error, match=words):
        block_sparse_attention(*draw(), **dict(block_indices=index, block_size=8) | change)


def test_errors_of_packed_sets():
    x, edges = draw(B=1), torch.tensor([0, 17, 63])
    options = dict(block_size=8, cu_seqlens=edges)
    with pytest.raises(ValueError, match="NQ = 8, expected at least 9"):
        block_sparse_attention(*x, block_indices=torch.zeros(1, 8, 2, 3, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match="NK = 5, expected at least 6"):
        block_sparse_attention(*x, block_mask=torch.ones(1, 2, 9, 5, dtype=torch.bool), **options)
