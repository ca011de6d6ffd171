"""What is special to LongNet: its patterns, their mixture, and the pieces of a begun segment."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.longnet import LongNet
from effattn_lite.ops import longnet, softmax_attention
from effattn_lite.reference.longnet import counts
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

RTOL = 1e-10
PATTERNS = {"segments": (4, 8, 24), "dilations": (1, 2, 3)}


def inputs(**sizes):
    return to_torch(make_inputs("longnet", **sizes))


def test_counts_by_hand():
    """Six tokens and two heads: segments of 2, whole, and of 6, every second token."""
    n = counts(6, 2, segments=(2, 6), dilations=(1, 2))
    even, odd = (["".join(map(str, row)) for row in head] for head in n)
    assert even == ["200000", "110000", "102000", "001100", "101020", "000011"]
    assert odd == ["100000", "120000", "001000", "011200", "000010", "010112"]


@pytest.mark.parametrize("heads, kv_heads, T", ((4, 2, 48), (1, 1, 1), (3, 3, 20)))
def test_reduces_to_softmax_attention(heads, kv_heads, T):
    x = inputs(H=heads, HKV=kv_heads, T=T)
    got = longnet(**x, segments=(48,), dilations=(1,), return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_a_pattern_twice_changes_no_output():
    """Each weight twice: o stays, the denominator doubles."""
    x = inputs()
    o, lse = longnet(**x, segments=(8, 8), dilations=(1, 1), return_lse=True, impl="torch")
    once = longnet(**x, segments=(8,), dilations=(1,), return_lse=True, impl="torch")
    assert relative_error((o, lse - np.log(2)), once) < RTOL


@pytest.mark.parametrize("T", (1, 7, 24, 53))
@pytest.mark.parametrize("heads, kv_heads", ((2, 2), (5, 1), (6, 3), (1, 1)))
@pytest.mark.parametrize(
    "segments, dilations",
    (
        ((4, 8, 24), (1, 2, 3)),
        ((7,), (3,)),  # a segment is no multiple of its dilation
        ((5, 10**9), (1, 4)),
        ((3, 12), (5, 12)),  # segments shorter than the dilation, and than heads' first tokens
        ((1,), (1,)),
    ),
    ids=str,
)
def test_any_pattern_and_heads(segments, dilations, heads, kv_heads, T):
    options = dict(segments=segments, dilations=dilations)
    x = make_inputs("longnet", T=T, H=heads, HKV=kv_heads, B=2, K=4, V=5)
    want = run_reference("longnet", x, **options)
    got = longnet(**to_torch(x), **options, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL
    assert relative_error(run_reference("longnet", x, form="dilated", **options), want) < RTOL


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_the_last_tokens_of_a_cache(impl, device):
    """Queries on more keys than queries, from each place in a segment: rows of the whole."""
    x = {n: t.float().to(device) for n, t in inputs(T=51, K=8, V=8, B=1).items()}
    for Tk in (2, 4, 24, 30, 51) if impl == "torch" else (30,):
        k, v = x["k"][:, :Tk], x["v"][:, :Tk]
        whole = longnet(x["q"][:, :Tk], k, v, **PATTERNS, return_lse=True, impl="torch")
        for T in {1, 2, Tk // 2, Tk - 1}:
            got = longnet(x["q"][:, Tk - T : Tk], k, v, **PATTERNS, return_lse=True, impl=impl)
            assert relative_error(got, tuple(y[:, -T:] for y in whole)) < 1e-5, (Tk, T)


def test_gradient_of_the_last_tokens():
    """What is filled up in front and behind gets no gradient and gives none, nor do tokens between."""
    x = inputs(B=1, T=17, H=2, HKV=1, K=3, V=2)
    x = [t.requires_grad_() for t in (x["q"][:, 10:].clone(), x["k"], x["v"])]
    options = dict(segments=(5, 12), dilations=(2, 3), impl="torch")
    assert torch.autograd.gradcheck(lambda *x: longnet(*x, **options), x)


def test_tokens_between_see_nothing():
    """No dilation of 1: of two heads, each keeps every fourth token."""
    o, lse = longnet(**inputs(), segments=(16,), dilations=(4,), return_lse=True, impl="torch")
    for h in range(2):
        kept = torch.arange(48) % 4 == h
        assert lse[:, kept, h].isfinite().all() and (lse[:, ~kept, h] == -torch.inf).all()
        assert (o[:, ~kept, h] == 0).all()


@pytest.mark.parametrize(
    "segments, dilations, match",
    (
        ((4, 8), (1,), "expected equally many"),
        ((), (), "expected equally many"),
        ((4, 0), (1, 2), r"segments is \(4, 0\).*>= 1"),
        ((4, 8), (1, -1), r"dilations is \(1, -1\).*>= 1"),
    ),
)
def test_errors(segments, dilations, match):
    with pytest.raises(ValueError, match=match):
        longnet(**inputs(), segments=segments, dilations=dilations)


def test_more_queries_than_keys():
    x = inputs()
    with pytest.raises(ValueError, match="T = 48 and k has Tk = 40"):
        longnet(x["q"], x["k"][:, :40], x["v"][:, :40], **PATTERNS)


@pytest.mark.parametrize("segments", ((4, 12), (4, 6)))
def test_layer_in_odd_pieces(segments):
    """The cache is emptied where all segments end, and never grows beyond."""
    layer = LongNet(16, 4, segments=segments, dilations=(1, 2), kv_heads=2).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 9, 1, 1, 10, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
        assert cache["k"].shape[1] == int(cache["length"]) % 12
        assert cache["k"].untyped_storage().nbytes() == cache["k"].nbytes
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


def test_layer_sees_no_further_than_its_segment():
    layer, x = LongNet(16, 2, segments=(4, 12), dilations=(1, 2)), torch.randn(1, 30, 16)
    other = torch.cat((torch.randn(1, 24, 16), x[:, 24:]), dim=1)
    assert max_error(layer(other)[:, 24:], layer(x)[:, 24:]) < 1e-5


def test_layer_compiles():
    layer, x = LongNet(16, 2, **PATTERNS), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
