"""What is special to LogSparse: its distances, how many layers reach everything, and the convolutions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from effattn_lite.layers.logsparse import LogSparse
from effattn_lite.ops import logsparse, softmax_attention
from effattn_lite.reference.logsparse import offsets
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("logsparse", **sizes))


@pytest.mark.parametrize(
    "T, options, want",
    (
        (1, {}, [0]),
        (20, {}, [0, 1, 2, 4, 8, 16]),
        (17, {}, [0, 1, 2, 4, 8, 16]),
        (16, {}, [0, 1, 2, 4, 8]),
        (20, {"local": 3}, [0, 1, 2, 3, 4, 6, 10, 18]),
        (20, {"restart": 8}, [0, 1, 2, 4, 8, 9, 10, 12, 16, 17, 18]),
        (20, {"local": 3, "restart": 8}, [0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14, 16, 17, 18, 19]),
        (4, {"local": 9}, [0, 1, 2, 3]),
    ),
)
def test_distances_by_hand(T, options, want):
    assert offsets(T, **options).tolist() == want


@pytest.mark.parametrize("T", (2, 16, 17, 64))
def test_layers_reach_every_earlier_token(T):
    """As many as a distance below T has binary digits; one less reaches not all."""
    one = np.isin(np.arange(T)[:, None] - np.arange(T), offsets(T)).astype(int)
    layers = (T - 1).bit_length()
    assert np.linalg.matrix_power(one, layers)[np.tril_indices(T)].all()
    fewer = (T - 1).bit_count() - 1
    assert not np.linalg.matrix_power(one, fewer)[-1, 0]


@pytest.mark.parametrize("heads, kv_heads", ((4, 2), (3, 1), (1, 1)))
def test_reduces_to_softmax_attention(heads, kv_heads):
    x = inputs(H=heads, HKV=kv_heads)
    got = logsparse(**x, local=48, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("T", (1, 2, 16, 17, 40))
@pytest.mark.parametrize(
    "options",
    ({}, {"local": 5}, {"restart": 1}, {"local": 4, "restart": 4}, {"local": 4, "restart": 100}),
    ids=str,
)
def test_any_distances(options, T):
    x = make_inputs("logsparse", T=T, H=4, HKV=2, K=4, V=5)
    want = run_reference("logsparse", x, **options)
    assert relative_error(logsparse(**to_torch(x), **options, return_lse=True, impl="torch"), want) < RTOL


@pytest.mark.parametrize("options", ({}, {"local": 3, "restart": 8}), ids=str)
def test_the_last_tokens_of_a_cache(options):
    x = inputs(T=33)
    whole = logsparse(**x, **options, return_lse=True, impl="torch")
    for T in (1, 2, 16, 32):
        got = logsparse(x["q"][:, -T:], x["k"], x["v"], **options, return_lse=True, impl="torch")
        assert relative_error(got, tuple(y[:, -T:] for y in whole)) < RTOL


@pytest.mark.parametrize(
    "options, match",
    (
        ({"local": 0}, "local is 0, expected >= 1"),
        ({"local": 4, "restart": 3}, "restart is 3, expected None or >= local = 4"),
    ),
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        logsparse(**inputs(), **options)


def test_more_queries_than_keys():
    x = inputs()
    with pytest.raises(ValueError, match="T = 48 and k has Tk = 40"):
        logsparse(x["q"], x["k"][:, :40], x["v"][:, :40])


def test_layer_convolves():
    """Queries and keys are causal convolutions, as torch computes them."""
    layer, x = LogSparse(12, 3, local=2, kernel_size=3).double(), torch.randn(2, 20, 12, dtype=torch.float64)

    def convolved(linear):
        weight = linear.weight.unflatten(1, (3, 12)).transpose(1, 2)  # [H K, D, n]
        return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight).transpose(1, 2).unflatten(2, (3, 4))

    v = layer.v_proj(x).unflatten(2, (3, 4))
    o = logsparse(convolved(layer.q_proj), convolved(layer.k_proj), v, local=2, impl="torch")
    assert relative_error(layer(x), layer.o_proj(o.flatten(2))) < RTOL


@pytest.mark.parametrize("kernel_size", (1, 4))
def test_layer_in_odd_pieces(kernel_size):
    layer = LogSparse(16, 4, local=2, restart=8, kernel_size=kernel_size, kv_heads=2).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 9, 1, 1, 10, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
        assert cache["tail"].shape[1] == kernel_size - 1
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


def test_layer_compiles():
    layer, x = LogSparse(16, 2), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
