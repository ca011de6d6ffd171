"""What is special to Linformer: a map of low rank, a longest text, tokens that all see each other."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.linformer import Linformer
from effattn_lite.ops.linformer import linformer
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("linformer").forms)


def draw(**sizes):
    return make_inputs("linformer", **sizes)


@FORMS
def test_reduces_to_softmax_attention(form):
    """e = f = the identity, M = T; not causal."""
    x = draw(T=20)
    got = run_reference("linformer", x | {"e": np.eye(20), "f": np.eye(20)}, form=form)
    want = run_reference("softmax_attention", {n: x[n] for n in "qkv"}, causal=False)
    assert relative_error(got, want) < 1e-10


@FORMS
def test_the_map_has_rank_m(form):
    """T values read one by one: the T by T map of a head, of rank 3, with rows that need not sum to 1."""
    x = draw(B=1, T=20, H=1, M=3)
    P = run_reference("linformer", x | {"v": np.eye(20)[None, :, None]}, form=form)[0][0, :, 0]
    assert np.linalg.matrix_rank(P) == 3
    assert abs(P.sum(-1) - 1).max() > 0.1


@FORMS
def test_a_later_token_changes_an_earlier_output(form):
    x = draw(T=20)
    k = x["k"].copy()
    k[:, -1] += 1
    before, after = (run_reference("linformer", x | {"k": y}, form=form)[0] for y in (x["k"], k))
    assert abs(after[:, 0] - before[:, 0]).max() > 1e-3


def test_by_hand():
    """Two tokens into one row: no choice is left, every query reads the same mixture 2 * 3 - 1 * 5."""
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    f = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    o, lse = linformer(one, one, v, e=f, f=f, return_lse=True)
    assert o.flatten().tolist() == [1.0, 1.0]
    assert lse.flatten().tolist() == [1.0, 1.0]  # the score of the row is 2 - 1


def test_a_shorter_text_takes_the_first_rows():
    x = to_torch(draw(T=20))
    short = {n: x[n][:, :13] for n in "qkv"}
    want = linformer(**short, e=x["e"][:13], f=x["f"][:13])
    assert max_error(linformer(**short, e=x["e"], f=x["f"]), want) == 0


def test_a_text_may_be_too_long():
    x = to_torch(draw(B=1, T=20))
    with pytest.raises(ValueError, match="e has 19 rows, expected at least the text's T = 20"):
        linformer(**x | {n: x[n][:19] for n in "ef"})
    with pytest.raises(ValueError, match=r"f has shape \(19, 12\), expected \[L, M\] = \(20, 12\)"):
        linformer(**x | {"f": x["f"][:19]})
    # packed, no sequence is
    edges = torch.tensor([0, 12, 20])
    assert linformer(**x | {n: x[n][:12] for n in "ef"}, cu_seqlens=edges).isfinite().all()


def test_layer_shares_its_projection():
    apart, shared = (Linformer(32, 4, max_length=40, rank=5, shared=x) for x in (False, True))
    count = [sum(p.numel() for p in layer.parameters()) for layer in (apart, shared)]
    assert count[0] - count[1] == 40 * 5
    with pytest.raises(ValueError, match="e has 40 rows, expected at least the text's T = 41"):
        shared(torch.randn(1, 41, 32))
