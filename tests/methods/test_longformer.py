"""What is special to Longformer: windows on both sides, global rows and columns, and how they are merged."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effattn_lite.layers.longformer import Longformer
from effattn_lite.ops import longformer, softmax_attention
from effattn_lite.reference.longformer import sets
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

RTOL = 1e-10
FAR = {"window": 4, "dilation": 2, "global_tokens": (41, 3, 0)}


def inputs(**sizes):
    return to_torch(make_inputs("longformer", **sizes))


def first(x):
    """The tensors of the first projections, which stand for the second where those are not given."""
    return {name: x[name] for name in "qkv"}


def test_sets_by_hand():
    """Seven tokens, one neighbour on each side or every second one, and token 1 global."""
    picture = [["".join(".x"[x] for x in row) for row in head] for head in sets(
        7, 2, window=2, dilation=(1, 2), global_tokens=(1,)
    ).astype(int)]  # fmt: skip
    assert picture[0] == ["xx.....", "xxxxxxx", ".xxx...", ".xxxx..", ".x.xxx.", ".x..xxx", ".x...xx"]
    assert picture[1] == ["xxx....", "xxxxxxx", "xxx.x..", ".x.x.x.", ".xx.x.x", ".x.x.x.", ".x..x.x"]


@pytest.mark.parametrize("window", (2, 4))
def test_layers_add_up_their_reach(window):
    """n layers see n w / 2 tokens on each side; with one global token, two see all."""
    near = sets(40, 1, window=window, global_tokens=())[0].astype(int)
    t = np.arange(40)
    for n in (1, 2, 5):
        assert ((np.linalg.matrix_power(near, n) > 0) == (abs(t[:, None] - t) <= n * window // 2)).all()
    one = sets(40, 1, window=window, global_tokens=(7,))[0].astype(int)
    assert not one.all() and (one @ one).all()


@pytest.mark.parametrize("heads, kv_heads, T", ((4, 2, 48), (1, 1, 1), (3, 1, 20)))
def test_reduces_to_softmax_attention(heads, kv_heads, T):
    x = inputs(H=heads, HKV=kv_heads, T=T)
    want = softmax_attention(**first(x), causal=False, return_lse=True, impl="torch")
    got = longformer(**x, window=96, global_tokens=(), return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL
    # all tokens are global, with one projection for both
    got = longformer(**first(x), window=2, global_tokens=range(T), return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


def test_global_rows_ask_with_the_second_projections():
    x = inputs(H=4, HKV=2)
    o = longformer(**x, window=6, global_tokens=(5, 30), impl="torch")
    second = (x[f"{name}_global"] for name in "qkv")
    rows = softmax_attention(*second, causal=False, impl="torch")
    assert relative_error(o[:, [5, 30]], rows[:, [5, 30]]) < RTOL
    # the others do not know them, and no other row of q_global is read
    x |= {f"{name}_global": torch.full_like(x[f"{name}_global"], torch.nan) for name in "qkv"}
    others = torch.ones(48, dtype=torch.bool)
    others[[5, 30]] = False
    assert (
        max_error(longformer(**x, window=6, global_tokens=(5, 30), impl="torch")[:, others], o[:, others])
        == 0
    )


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_edges_of_the_window(impl, device):
    """Token 20 sees 17 to 23 and global token 40, and neither 16 nor 24."""
    x = {n: t.float().to(device) for n, t in inputs(B=1, K=8, V=8).items()}

    def row():
        return longformer(**x, window=6, global_tokens=(40,), impl=impl)[:, 20].clone()

    before = row()
    for n in "kv":
        x[n][:, :17] = torch.randn_like(x[n][:, :17])
        x[n][:, 24:40] = torch.randn_like(x[n][:, 24:40])
    assert max_error(row(), before) == 0
    for t in (17, 23, 40):
        x["v"][:, t] += 1
        after = row()
        assert max_error(after, before) > 1e-4, t
        before = after


@pytest.mark.parametrize("T", (1, 2, 15, 40))
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (3, 3), (3, 1), (14, 2)))
@pytest.mark.parametrize(
    "options",
    (
        {"window": 2, "global_tokens": ()},
        {"window": 8},
        {"window": 10**6},
        {"window": 4, "global_tokens": (0, 2)},
        {"window": 4, "global_tokens": (2, 1, 0)},
        {"window": 4, "dilation": 3, "global_tokens": (0,)},
        {"window": 2, "dilation": 7, "global_tokens": (39, 14, 1000)},
        {"window": 6, "dilation": 50, "global_tokens": (1,)},
    ),
    ids=str,
)
def test_any_window_and_heads(options, heads, kv_heads, T):
    x = make_inputs("longformer", T=T, H=heads, HKV=kv_heads, B=2, K=4, V=5)
    want = run_reference("longformer", x, **options)
    got = longformer(**to_torch(x), **options, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("heads, kv_heads", ((4, 4), (6, 2), (3, 1)))
def test_a_dilation_for_each_head(heads, kv_heads):
    """As the paper lets some heads look near and others far."""
    x = make_inputs("longformer", T=31, H=heads, HKV=kv_heads, K=4, V=5)
    options = dict(window=4, dilation=(3, 1, 2, 1, 3, 1)[:heads], global_tokens=(9,))
    want = run_reference("longformer", x, **options)
    assert relative_error(longformer(**to_torch(x), **options, return_lse=True, impl="torch"), want) < RTOL
    assert relative_error(run_reference("longformer", x, form="banded", **options), want) < RTOL


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("dilation", (1, 3))
def test_a_mask_has_its_own_tokens_in_each_row(impl, dilation, device):
    """Rows with three global tokens, with one and with none; each equals the same positions alone."""
    x = {n: t.float().to(device) for n, t in inputs(B=3, T=30, K=8, V=8).items()}
    positions = ((4, 5, 28), (0,), ())
    mask = torch.zeros(3, 30, dtype=torch.bool, device=device)
    for row, found in zip(mask, positions, strict=True):
        row[list(found)] = True
    options = dict(window=4, dilation=dilation, return_lse=True)
    got = longformer(**x, global_tokens=mask, impl=impl, **options)
    for b, found in enumerate(positions):
        alone = {n: t[b : b + 1] for n, t in x.items()}
        want = longformer(**alone, global_tokens=found, impl="torch", **options)
        assert relative_error(tuple(y[b : b + 1] for y in got), want) < 1e-5


def test_a_mask_of_packed_sequences():
    """The mask goes over all tokens of the row, positions begin anew in each sequence."""
    x, edges = inputs(B=1, T=30), torch.tensor([0, 11, 11, 12, 30])
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[0, [2, 7, 14, 19]] = True
    packed = longformer(**x, window=4, global_tokens=mask, cu_seqlens=edges, return_lse=True, impl="torch")
    same = longformer(**x, window=4, global_tokens=(7, 2), cu_seqlens=edges, return_lse=True, impl="torch")
    assert relative_error(packed, same) < RTOL


@pytest.mark.parametrize("form", ("positions", "mask"))
def test_gradient(form):
    """Through windows, columns and rows; sizes at which no two of these are the same."""
    x = inputs(B=2, T=9, H=2, HKV=1, K=2, V=2)
    tokens = (7, 4)
    if form == "mask":
        tokens = torch.zeros(2, 9, dtype=torch.bool)
        tokens[0, [7, 4]] = tokens[1, 1] = True
    names, values = list(x), [t.requires_grad_() for t in x.values()]

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return longformer(
            **given, window=2, dilation=(1, 2), global_tokens=tokens, return_lse=True, impl="torch"
        )

    assert torch.autograd.gradcheck(function, values)


def test_equals_masked_dense_attention():
    """torch's own attention under the mask of the sets, in both directions."""
    x = inputs(H=2)
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    see = torch.tensor(sets(48, 2, **FAR))
    want = scaled_dot_product_attention(q, k, v, attn_mask=see).transpose(1, 2)
    assert relative_error(longformer(**first(x), **FAR, impl="torch"), want) < RTOL


def test_negative_scale():
    x = make_inputs("longformer", T=20)
    want = run_reference("longformer", x, **FAR, scale=-0.3)
    assert relative_error(longformer(**to_torch(x), **FAR, scale=-0.3, return_lse=True), want) < RTOL


@pytest.mark.parametrize(
    "options, match",
    (
        ({"window": 5}, "window is 5, expected an even number >= 2"),
        ({"window": 0}, "window is 0, expected an even number >= 2"),
        ({"dilation": 0}, "dilation is 0, expected one number >= 1, or 2"),
        ({"dilation": (1, 2, 3)}, r"dilation is \(1, 2, 3\), expected one number >= 1, or 2"),
        ({"global_tokens": (3, 3)}, r"global_tokens is \(3, 3\), expected distinct positions >= 0"),
        ({"global_tokens": (-1,)}, r"global_tokens is \(-1,\), expected distinct positions >= 0"),
        ({"global_tokens": torch.ones(2, 40, dtype=torch.bool)}, r"global_tokens has shape \(2, 40\).*48"),
    ),
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        longformer(**inputs(), **{"window": 4} | options)


def test_mask_must_be_bool():
    with pytest.raises(TypeError, match="global_tokens is torch.int64, expected bool"):
        longformer(**inputs(), window=4, global_tokens=torch.ones(2, 48, dtype=torch.int64))


def test_layer_begins_with_one_projection():
    """The second projections start as the first, so tokens chosen later change nothing but what they see."""
    layer, x = Longformer(16, 4, window=64, kv_heads=2).double(), torch.randn(2, 20, 16, dtype=torch.float64)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[1, 4] = True
    assert relative_error(layer(x, mask), layer(x, ())) < RTOL
    layer.global_proj["v"].weight.data.mul_(2)
    different = (layer(x, mask) - layer(x, ())).abs().amax(-1) > 1e-3
    assert (different == mask).all()


def test_layer_compiles():
    layer, x = Longformer(16, 2, window=4, global_tokens=(0, 9)), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
