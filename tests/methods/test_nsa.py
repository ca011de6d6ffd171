"""What is special to NSA: its map from spans to blocks, what is always read, each branch alone, the layer."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

from effattn_lite.layers.nsa import NSA
from effattn_lite.ops import block_sparse_attention, nsa, sliding_window, softmax_attention
from effattn_lite.ops.engines import nsa as engine
from effattn_lite.ops.nsa import compress, select
from effattn_lite.reference import nsa as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
OPTIONS = dict(block_size=8, top_n=4, window=5, cmp_size=8, cmp_stride=4)
SELECT = {name: n for name, n in OPTIONS.items() if name != "window"}
SPANS = {name: n for name, n in OPTIONS.items() if name.startswith("cmp")}


def inputs(**sizes):
    return to_torch(make_inputs("nsa", **sizes))


def only(branch, **sizes):
    """Inputs whose gate is 1 for one branch and 0 for the others."""
    x = inputs(**sizes)
    return x | {g: torch.full_like(x[g], g == f"g_{branch}") for g in ("g_cmp", "g_slc", "g_win")}


def qkv(x):
    return {name: x[name] for name in "qkv"}


@pytest.mark.parametrize("window", (1, 5, 60))
def test_reduces_to_sliding_window(window):
    x = only("win", H=4, HKV=2)
    got = nsa(**x, **OPTIONS | dict(window=window), impl="torch")
    assert relative_error(got, sliding_window(**qkv(x), window=window, impl="torch")) < RTOL


def test_selected_branch_alone():
    x = only("slc", H=4, HKV=2)
    got = nsa(**x, **OPTIONS, impl="torch", return_lse=True)
    blocks = select(x["q"], x["k"], **SELECT, impl="torch")
    want = block_sparse_attention(
        **qkv(x), block_indices=blocks, block_size=8, query_block_size=1, return_lse=True, impl="torch"
    )
    assert relative_error(got, want) < RTOL
    # with room for all blocks nothing is left out
    got = nsa(**x, **OPTIONS | dict(top_n=99), impl="torch")
    assert relative_error(got, softmax_attention(**qkv(x), impl="torch")) < RTOL


@pytest.mark.parametrize("given", (False, True))
def test_compressed_branch_alone(given):
    """Softmax over the spans that have ended; nothing before the first one has."""
    x = only("cmp", T=30, H=4, HKV=2)
    summaries = {f"{n}_cmp": compress(x[n], **SPANS) for n in "kv"}
    if given:
        summaries = {name: torch.randn_like(s) for name, s in summaries.items()}
    got = nsa(**x, **(summaries if given else {}), **OPTIONS, impl="torch")
    for t in range(30):
        n = max((t + 1 - 8) // 4 + 1, 0)
        if not n:
            assert (got[:, t] == 0).all()
            continue
        k, v = (s[:, :n].transpose(1, 2) for s in summaries.values())
        q = x["q"][:, t : t + 1].transpose(1, 2)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]
        assert relative_error(got[:, t], want) < RTOL


def test_gates_weigh_the_branches():
    x = inputs()
    ones = {g: torch.ones_like(x[g]) for g in ("g_cmp", "g_slc", "g_win")}
    parts = {g: nsa(**x | {h: ones[h] * (g == h) for h in ones}, **OPTIONS, impl="torch") for g in ones}
    want = sum(x[g][..., None] * parts[g] for g in ones)
    assert relative_error(nsa(**x, **OPTIONS, impl="torch"), want) < RTOL


@pytest.mark.parametrize("importance", (reference.importance, engine.importance))
@pytest.mark.parametrize(
    "block_size, size, stride, weights",
    (
        (64, 32, 16, [1, 2, 2, 2, 1]),
        (64, 64, 64, [1]),
        (64, 64, 32, [1, 2, 1]),
        (16, 64, 16, [1, 1, 1, 1]),
        (12, 8, 4, [1, 2, 2, 1]),
    ),
)
def test_map_from_spans_to_blocks(importance, block_size, size, stride, weights):
    """A span counts for a block with the strides that they share, counted token by token."""
    NK, NC = 9, (9 * block_size - size) // stride + 1
    of_span = [np.arange(i * stride, i * stride + size) // block_size for i in range(NC)]
    want = np.array([[(tokens == j).sum() // stride for tokens in of_span] for j in range(NK)])
    if importance is reference.importance:
        got = importance(np.eye(NC), NK, block_size=block_size, cmp_size=size, cmp_stride=stride)
    else:
        got = importance(torch.eye(NC), NK, block_size, size, stride).numpy()
    assert np.array_equal(got.T, want)
    assert [n for n in want[4] if n] == weights


@pytest.mark.parametrize("top_n", (3, 5, 99))
def test_first_and_last_two_blocks_are_always_in(top_n):
    x = inputs(T=63, H=4, HKV=2)
    blocks = select(x["q"], x["k"], **SELECT | dict(top_n=top_n), impl="torch")
    assert blocks.shape == (*x["q"].shape[:2], 2, min(top_n, 8)) and blocks.dtype == torch.int32
    for t in range(63):
        own = t // 8
        sets = [set(row.tolist()) - {-1} for row in blocks[:, t].flatten(0, 1)]
        assert all({0, max(own - 1, 0), own} <= s <= set(range(own + 1)) for s in sets)
        assert all(len(s) == min(top_n, own + 1) for s in sets)


def test_selection_by_hand():
    """Only the summary of tokens 16 to 23 answers: its block is chosen for every later query."""
    k = torch.zeros(1, 64, 1, 1)
    k[:, 16:24] = 5.0
    blocks = select(torch.ones(1, 64, 2, 1), k, block_size=8, top_n=4, cmp_size=8, cmp_stride=8)
    assert all(sorted(blocks[0, t, 0].tolist()) == [0, 2, t // 8 - 1, t // 8] for t in range(40, 64))


def test_ties_go_to_the_lower_block():
    zeros = torch.zeros(1, 64, 2, 8)
    blocks = select(zeros, zeros, block_size=8, top_n=5, cmp_size=8, cmp_stride=8)
    assert all(sorted(row) == [0, 1, 2, 6, 7] for row in blocks[0, 56:, 0].tolist())


@pytest.mark.parametrize("sizes", (dict(T=63), dict(T=7), dict(T=50, H=4, HKV=2)), ids=str)
@pytest.mark.parametrize("top_n, size, stride", ((4, 8, 4), (3, 4, 4), (5, 16, 8)))
def test_selection_equals_reference(sizes, top_n, size, stride):
    x, how = make_inputs("nsa", **sizes), dict(block_size=8, top_n=top_n, cmp_size=size, cmp_stride=stride)
    want = reference.select(x["q"], x["k"], **how)
    got = select(torch.tensor(x["q"]), torch.tensor(x["k"]), **how, impl="torch")
    assert np.array_equal(np.sort(got.numpy(), -1), np.sort(want, -1))


def test_in_tiles(monkeypatch):
    x = inputs(T=50)
    want = nsa(**x, **OPTIONS, impl="torch")
    monkeypatch.setattr(sys.modules["effattn_lite.ops.engines.nsa"], "QUERY_TILE", 7)
    assert relative_error(nsa(**x, **OPTIONS, impl="torch"), want) < RTOL


@pytest.mark.parametrize("edges", ([0, 0, 20, 21, 48], [0, 48], [0, 5, 10, 15, 48, 48]), ids=str)
def test_spans_and_blocks_count_from_each_start(edges):
    x = inputs(B=1)
    packed = select(x["q"], x["k"], **SELECT, cu_seqlens=torch.tensor(edges), impl="torch")
    for a, b in zip(edges, edges[1:], strict=False):
        alone = select(x["q"][:, a:b], x["k"][:, a:b], **SELECT, impl="torch")
        n = alone.shape[-1]
        assert torch.equal(packed[:, a:b, :, :n], alone) and (packed[:, a:b, :, n:] == -1).all()


def test_decoding_is_the_last_row():
    """The window may be cut to what the last queries see, and to no less."""
    x = inputs()
    whole = nsa(**x, **OPTIONS, impl="torch")
    for n in (1, 9):
        last = {name: t if name in "kv" else t[:, -n:] for name, t in x.items()}
        near = {f"{name}_win": x[name][:, -(n + 4) :] for name in "kv"}
        assert relative_error(nsa(**last, **OPTIONS, impl="torch"), whole[:, -n:]) < RTOL
        assert relative_error(nsa(**last, **near, **OPTIONS, impl="torch"), whole[:, -n:]) < RTOL
        with pytest.raises(ValueError, match=f"k_win has {n + 3} tokens, expected {n + 4} to Tk = 48"):
            nsa(**last, **{name: t[:, 1:] for name, t in near.items()}, **OPTIONS)


def test_gradient_of_all_branches():
    """Central differences in every input, where the selection leaves something out."""
    x = inputs(B=1, T=11, H=2, HKV=1, K=3, V=2)
    options = dict(block_size=2, top_n=3, window=2, cmp_size=2, cmp_stride=1)
    more = {f"{n}_{b}": torch.randn_like(x[n][:, :m]) for b, m in (("cmp", 10), ("win", 11)) for n in "kv"}
    x = {name: t.requires_grad_() for name, t in (x | more).items()}
    how = {name: n for name, n in options.items() if name != "window"}
    blocks = select(x["q"], x["k"], k_cmp=x["k_cmp"], **how, impl="torch")
    assert (blocks[0, -1] >= 0).all()
    call = partial(nsa, **options, return_lse=True, impl="torch")
    assert torch.autograd.gradcheck(
        lambda *values: call(**dict(zip(x, values, strict=True))), tuple(x.values())
    )


def test_no_gradient_through_the_selection():
    x = {name: t.requires_grad_() for name, t in only("slc").items()}
    k_cmp = torch.randn_like(compress(x["k"], **SPANS)).requires_grad_()
    nsa(**x, k_cmp=k_cmp, **OPTIONS, impl="torch").sum().backward()
    assert k_cmp.grad is None or (k_cmp.grad == 0).all()
    assert x["k"].grad.abs().max() > 0


@pytest.mark.parametrize(
    "change, message",
    (
        (dict(top_n=2), "top_n is 2, expected >= 3"),
        (dict(window=0), "window is 0, expected >= 1"),
        (dict(cmp_stride=0), "cmp_stride is 0, expected >= 1"),
        (dict(cmp_size=6), "cmp_size is 6, expected a multiple of cmp_stride = 4"),
        (dict(block_size=10), "block_size is 10, expected a multiple of cmp_stride = 4"),
        (dict(k_cmp=torch.zeros(2, 9, 2, 8, dtype=torch.float64)), "k_cmp has 9 spans, expected .* = 11"),
    ),
    ids=str,
)
def test_errors(change, message):
    x = inputs(B=2, T=48, H=2, K=8)
    with pytest.raises(ValueError, match=message):
        nsa(**x, **OPTIONS | change)


@pytest.mark.parametrize(
    "change, error, message",
    (
        (
            dict(g_win=torch.zeros(2, 48, 1)),
            ValueError,
            r"g_win has shape \(2, 48, 1\), expected \[B, T",
        ),
        (dict(v_win=torch.zeros(2, 47, 2, 8, dtype=torch.float64)), ValueError, "v_win has shape"),
        (dict(k=torch.zeros(2, 48, 2, 8)), TypeError, "k is torch.float32, expected torch.float64"),
        (dict(k=torch.zeros(2, 40, 2, 8, dtype=torch.float64)), ValueError, "expected at least T = 48"),
        (dict(cu_seqlens=torch.tensor([0, 48])), ValueError, "q has B = 2, expected 1"),
    ),
    ids=str,
)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        nsa(**inputs(B=2, T=48, H=2, K=8) | change, **OPTIONS)


@pytest.mark.parametrize("sizes", (dict(K=260, V=8), dict(K=8, V=260)), ids=str)
def test_kernels_refuse_wide_heads(sizes):
    x = {name: t.float() for name, t in inputs(B=1, T=20, H=2, **sizes).items()}
    with pytest.raises(NotImplementedError, match="K <= 256 and V <= 256, got"):
        nsa(**x, **OPTIONS, impl="triton")
    assert nsa(**x, **OPTIONS).isfinite().all()


def test_layer_without_new_tokens():
    layer = NSA(16, 4, **OPTIONS, kv_heads=2).double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    cache = layer.prefill(x[:, :20])[1]
    y, cache = layer.prefill(x[:, :0], cache)
    assert y.shape == (2, 0, 16) and int(cache["length"]) == 20
    assert relative_error(layer.prefill(x[:, 20:], cache)[0], layer(x)[:, 20:]) < RTOL


def test_layer_in_odd_pieces():
    layer = NSA(16, 4, **OPTIONS, kv_heads=2).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL
    assert cache["k_win"].shape[1] == 5 and cache["k_rest"].shape[1] < 8 and cache["k_cmp"].shape[1] == 9


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_a_block_that_nobody_chose_is_not_seen(impl, device):
    """Block 1 answers every later query worst: its values do not matter to the selected branch."""
    x = {n: t.float().to(device) for n, t in only("slc", B=1, T=48, H=2, K=8, V=8).items()}
    x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    x["k"][:, 8:16] *= -1
    x["v"].requires_grad_()
    o = nsa(**x, **OPTIONS | dict(top_n=4, cmp_stride=8), impl=impl)
    o[:, 32:].sum().backward()
    assert (x["v"].grad[:, 8:16] == 0).all() and (x["v"].grad[:, :8].abs().sum() > 0).all()
    assert max_error(o, nsa(**x, **OPTIONS | dict(top_n=4, cmp_stride=8), impl="torch")) < 1e-5
