"""What is special to Luna: a Linformer whose projection is an attention map, and what it hands on."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.luna import Luna
from effattn_lite.ops.luna import luna, weights
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("luna").forms)


def draw(**sizes):
    return make_inputs("luna", **sizes)


@FORMS
def test_is_linformer_with_an_attention_map_for_a_projection(form):
    """One text, one pack head: e = f = A^T."""
    x = draw(B=1, T=30, H=3, HKV=1)
    A = weights(*(torch.tensor(x[n]) for n in "pc"))[0, :, 0].numpy()  # [M, T]
    got = run_reference("luna", x, form=form)
    want = run_reference("linformer", {n: x[n] for n in "qkv"} | {"e": A.T, "f": A.T})
    assert relative_error(got, want) < 1e-10


@FORMS
def test_equal_keys_to_pack_by_give_the_mean(form):
    """Where all tokens look alike to P, every packed value is the mean, and so is every output."""
    x = draw(T=20)
    o = run_reference("luna", x | {"c": np.ones_like(x["c"])}, form=form)[0]
    assert relative_error(o, np.broadcast_to(x["v"].mean(1, keepdims=True), o.shape)) < 1e-10


@FORMS
def test_the_map_is_one_of_averages(form):
    """Of rank M at most, as Linformer's; its rows sum to 1 and have no negative weight."""
    x = draw(B=1, T=20, H=1, M=3)
    P = run_reference("luna", x | {"v": np.eye(20)[None, :, None]}, form=form)[0][0, :, 0]
    assert np.linalg.matrix_rank(P) == 3
    assert P.min() >= 0 and abs(P.sum(-1) - 1).max() < 1e-12


@FORMS
def test_the_order_of_the_text_does_not_count(form):
    """No place is learned: tokens may be renumbered, and a text may have any length."""
    x = draw(T=20)
    order = np.random.default_rng(1).permutation(20)
    moved = {n: x[n][:, order] for n in "qkvc"}
    want = run_reference("luna", x, form=form)[0][:, order]
    assert relative_error(run_reference("luna", x | moved, form=form)[0], want) < 1e-10


def test_by_hand():
    """One packing query that prefers the second token 3 to 1: all read 1/4 * 4 + 3/4 * 8 = 7."""
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    v, c = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([4.0, 8.0], [0.0, np.log(3.0)]))
    o, lse = luna(one, one, v, c=c, p=one[:, :1], return_lse=True)
    assert relative_error(o, torch.full_like(o, 7.0)) < 1e-12
    assert relative_error(lse, torch.ones_like(lse)) < 1e-12  # the packed key is 1


def test_packed_texts_may_share_their_queries():
    x = to_torch(draw(B=1, T=20))
    edges = torch.tensor([0, 12, 20])
    own = x | {"p": x["p"].expand(2, *x["p"].shape[1:])}
    assert relative_error(luna(**x, cu_seqlens=edges), luna(**own, cu_seqlens=edges)) == 0
    with pytest.raises(ValueError, match=r"p has shape \(3, 12, 2, 20\), expected .* = \(2, 12, 2, 20\)"):
        luna(**x | {"p": x["p"].expand(3, *x["p"].shape[1:])}, cu_seqlens=edges)


def test_heads_divide_over_pack_heads():
    x = to_torch(draw(B=1, T=5, H=4, HKV=3))
    with pytest.raises(ValueError, match="q has 4 heads, expected a multiple of k's 3"):
        luna(**x)


def test_layer_packs_before_or_after_it_projects():
    """Pack the text as it is, then project what is packed, as the authors' code does: the same output."""
    layer, x = Luna(32, 4, packed=6).double(), torch.randn(2, 15, 32, dtype=torch.float64)
    Y = layer.pack(x)  # [B, M, D]
    pairs = ((layer.q_proj, x), (layer.k_proj, Y), (layer.v_proj, Y))
    q, k, v = (proj(y).unflatten(-1, (4, 8)) for proj, y in pairs)
    A = (torch.einsum("bthk,bmhk->bhtm", q, k) / 8**0.5).softmax(-1)
    want = layer.o_proj(torch.einsum("bhtm,bmhv->bthv", A, v).flatten(2))
    assert relative_error(layer(x), want) < 1e-12


def test_layer_goes_on_with_what_another_has_packed():
    layer, x = Luna(32, 4, packed=6).double(), torch.randn(2, 15, 32, dtype=torch.float64)
    p = layer.pack(x)
    assert p.shape == (2, 6, 32)
    own = layer.p[None].expand(2, 6, 32)
    assert relative_error(layer(x, own), layer(x)) < 1e-12
    assert relative_error(layer(x, p), layer(x)) > 1e-6
