"""What is special to the Sparse Transformer: its sets, how far two layers reach, and its rearrangements."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.sparse_transformer import SparseTransformer
from effattn_lite.ops import sliding_window, softmax_attention, sparse_transformer
from effattn_lite.ops.engines.softmax_attention import attend, merge
from effattn_lite.reference.sparse_transformer import sets
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

RTOL = 1e-10
STRIDED = {"pattern": "strided", "stride": 5}
FIXED = {"pattern": "fixed", "stride": 7, "summary": 3}


def inputs(**sizes):
    return to_torch(make_inputs("sparse_transformer", **sizes))


def picture(see):
    return ["".join(".x"[x] for x in row) for row in see.astype(int)]


def test_sets_by_hand():
    """Seven tokens, l = 3, drawn by hand."""
    A, B = sets(7, pattern="strided", stride=3)
    assert picture(A) == ["x......", "xx.....", "xxx....", "xxxx...", ".xxxx..", "..xxxx.", "...xxxx"]
    assert picture(B) == ["x......", ".x.....", "..x....", "x..x...", ".x..x..", "..x..x.", "x..x..x"]
    A, B = sets(7, pattern="fixed", stride=3, summary=1)
    assert picture(A) == ["x......", "xx.....", "xxx....", "...x...", "...xx..", "...xxx.", "......x"]
    assert picture(B) == [".......", ".......", "..x....", "..x....", "..x....", "..x..x.", "..x..x."]


@pytest.mark.parametrize("options", (STRIDED, FIXED), ids=("strided", "fixed"))
def test_two_layers_reach_every_earlier_token(options):
    one = sets(50, **options).any(0).astype(int)
    assert not one[np.tril_indices(50)].all()
    assert (one @ one)[np.tril_indices(50)].all()


@pytest.mark.parametrize("heads, kv_heads", ((4, 2), (3, 1), (1, 1)))
def test_reduces_to_softmax_attention(heads, kv_heads):
    x = inputs(H=heads, HKV=kv_heads)
    got = sparse_transformer(**x, pattern="fixed", stride=50, summary=50, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_even_heads_of_strided_are_a_window():
    x = inputs(H=4)
    got = sparse_transformer(**x, stride=6, impl="torch")
    assert relative_error(got[:, :, ::2], sliding_window(**x, window=7, impl="torch")[:, :, ::2]) < RTOL


@pytest.mark.parametrize("T", (1, 2, 20, 35, 36))
@pytest.mark.parametrize("heads, kv_heads", ((2, 2), (5, 1), (6, 2), (4, 1)))
@pytest.mark.parametrize(
    "options",
    (
        STRIDED,
        {"pattern": "strided", "stride": 1},
        FIXED,
        {"pattern": "fixed", "stride": 6, "summary": 1},
        {"pattern": "fixed", "stride": 6, "summary": 3},
        {"pattern": "fixed", "stride": 4, "summary": 4},
        {"pattern": "strided", "stride": 10**9},
        {"pattern": "fixed", "stride": 40, "summary": 10},
        {"pattern": "fixed", "stride": 10**9, "summary": 5},
    ),
    ids=str,
)
def test_any_stride_and_heads(options, heads, kv_heads, T):
    x = make_inputs("sparse_transformer", T=T, H=heads, HKV=kv_heads, B=2, K=4, V=5)
    want = run_reference("sparse_transformer", x, **options)
    assert (
        relative_error(sparse_transformer(**to_torch(x), **options, return_lse=True, impl="torch"), want)
        < RTOL
    )


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("options", (STRIDED, FIXED), ids=("strided", "fixed"))
def test_the_last_tokens_of_a_cache(options, impl, device):
    """Queries on more keys than queries, from each place in a block: rows of the whole."""
    x = {n: t.float().to(device) for n, t in inputs(T=39, K=8, V=8, B=1).items()}
    for Tk in (2, 4, 14, 33, 39) if impl == "torch" else (2, 33):
        k, v = x["k"][:, :Tk], x["v"][:, :Tk]
        whole = sparse_transformer(x["q"][:, :Tk], k, v, **options, return_lse=True, impl="torch")
        for T in {1, 2, Tk // 2, Tk}:
            got = sparse_transformer(x["q"][:, Tk - T : Tk], k, v, **options, return_lse=True, impl=impl)
            assert relative_error(got, tuple(y[:, -T:] for y in whole)) < 1e-5, (Tk, T)


def test_first_tokens_of_fixed_see_no_column():
    o, lse = sparse_transformer(**inputs(), **FIXED, return_lse=True, impl="torch")
    assert (o[:, :4, 1] == 0).all() and (lse[:, :4, 1] == -torch.inf).all()
    assert lse[:, 4:].isfinite().all() and lse[:, :, 0].isfinite().all()


@pytest.mark.parametrize("options", (STRIDED, FIXED), ids=("strided", "fixed"))
def test_gradient_of_the_last_tokens(options):
    """What is filled up in front and behind gets no gradient and gives none."""
    x = inputs(B=1, T=17, H=2, HKV=1, K=3, V=2)
    x = [t.requires_grad_() for t in (x["q"][:, 8:].clone(), x["k"], x["v"])]
    assert torch.autograd.gradcheck(lambda *x: sparse_transformer(*x, **options, impl="torch"), x)


def test_merge_is_one_softmax():
    """Over three disjoint parts of the keys, one of them unseen."""
    x = inputs(T=30)
    far = attend(x["q"], x["k"][:, :10], x["v"][:, :10], causal=False, impl="torch")
    near = attend(x["q"], x["k"][:, 10:], x["v"][:, 10:], causal=False, impl="torch")
    none = torch.zeros_like(far[0]), torch.full_like(far[1], -torch.inf)
    want = softmax_attention(**x, causal=False, return_lse=True, impl="torch")
    assert relative_error(merge([none, far, near]), want) < RTOL
    o, lse = merge([none, none])
    assert (o == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "options, match",
    (
        ({"pattern": "dilated", "stride": 4}, "pattern is 'dilated', expected one of"),
        ({"stride": 0}, "stride is 0, expected >= 1"),
        ({"pattern": "fixed", "stride": 4, "summary": 5}, "summary is 5, expected 1 to stride = 4"),
        ({"pattern": "fixed", "stride": 4, "summary": 0}, "summary is 0, expected 1 to stride = 4"),
    ),
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        sparse_transformer(**inputs(), **options)


def test_more_queries_than_keys():
    x = inputs()
    with pytest.raises(ValueError, match="T = 48 and k has Tk = 40"):
        sparse_transformer(x["q"], x["k"][:, :40], x["v"][:, :40], stride=4)


@pytest.mark.parametrize("options", (STRIDED, FIXED), ids=("strided", "fixed"))
def test_layer_in_odd_pieces(options):
    layer = SparseTransformer(16, 4, **options, kv_heads=2).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


def test_layer_compiles():
    layer, x = SparseTransformer(16, 2, **FIXED), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
