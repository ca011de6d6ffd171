"""What is special to sliding windows: their limits, their edges, and a cache that rolls."""

import math

import pytest
import torch
from torch import nn

from effattn_lite.layers.common import rotate
from effattn_lite.layers.sliding_window import SlidingWindow
from effattn_lite.ops import sliding_window, softmax_attention
from effattn_lite.reference import sliding_window as ours
from effattn_lite.reference import softmax_attention as full
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("sliding_window", **sizes))


@pytest.mark.parametrize("window", (48, 60))
def test_reduces_to_softmax_attention(window):
    x = inputs(H=4, HKV=2)
    got = sliding_window(**x, window=window, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_a_window_of_one_copies_the_value():
    x = inputs()
    o, lse = sliding_window(**x, window=1, return_lse=True, impl="torch")
    assert relative_error(o, x["v"]) < RTOL
    assert relative_error(lse, (x["q"] * x["k"]).sum(-1) / math.sqrt(16)) < RTOL


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("window", (6, 33))
def test_edges_of_the_window(impl, window, device):
    """Token 40 sees token 40 - W + 1, and not the one before."""
    x = {n: t.float().to(device) for n, t in inputs().items()}

    def last():
        return sliding_window(**x, window=window, impl=impl)[:, 40]

    before = last()
    for n in "kv":
        x[n][:, : 41 - window] = torch.randn_like(x[n][:, : 41 - window])
    assert max_error(last(), before) == 0
    x["v"][:, 41 - window] += 1
    assert max_error(last(), before) > 1e-4


def test_decoding_takes_the_last_queries():
    x = inputs()
    whole = sliding_window(**x, window=7, impl="torch")
    some = sliding_window(x["q"][:, -3:], x["k"][:, -9:], x["v"][:, -9:], window=7, impl="torch")
    assert relative_error(some, whole[:, -3:]) < RTOL


def test_window_must_hold_the_token():
    with pytest.raises(ValueError, match="window is 0"):
        sliding_window(**inputs(), window=0)


def test_published_cache():
    """Mistral 7B at 32k tokens: the rolling cache takes an eighth of the whole one."""
    sizes = dict(B=1, T=32_768, H=32, HKV=8, K=128, V=128)
    rolling = ours.cost(form="banded", **sizes, window=4_096)["state_bytes"]
    assert full.cost(form="online", **sizes)["state_bytes"] == 8 * rolling


@pytest.mark.parametrize("kv_heads, heads", ((2, 2), (1, 3)))
def test_layer_is_the_papers_rolling_buffer(kv_heads, heads):
    """Token by token: rotated keys and values of token t go into slot t mod W, over the oldest."""
    W, T = 5, 21
    layer = SlidingWindow(12, heads, window=W, kv_heads=kv_heads, head_dim=4).double()
    x = torch.randn(2, T, 12, dtype=torch.float64)
    q, k, v = layer.project(x)
    q, k = rotate(q, torch.arange(T)), rotate(k, torch.arange(T))
    keys, values, rows = torch.zeros_like(k[:, :W]), torch.zeros_like(v[:, :W]), []
    for t in range(T):
        keys[:, t % W], values[:, t % W] = k[:, t], v[:, t]
        used = slice(0, min(t + 1, W))
        kt, vt = (a[:, used].repeat_interleave(heads // kv_heads, dim=2) for a in (keys, values))
        p = torch.einsum("bhk,bjhk->bhj", q[:, t], kt).div(math.sqrt(4)).softmax(-1)
        rows.append(torch.einsum("bhj,bjhv->bhv", p, vt))
    assert relative_error(layer(x), layer.o_proj(torch.stack(rows, dim=1).flatten(2))) < RTOL


def test_layer_in_odd_pieces():
    layer, x = SlidingWindow(16, 2, window=6, kv_heads=1).double(), torch.randn(2, 41, 16).double()
    cache, parts = None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
        assert cache["k"].shape[1] <= 5
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


@pytest.mark.parametrize("layers", (1, 2, 3))
def test_layers_add_up_their_reach(layers):
    """n layers see n (W - 1) tokens back, and not one more."""
    stack = nn.Sequential(*(SlidingWindow(16, 2, window=4) for _ in range(layers))).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64, requires_grad=True)
    stack(x)[:, -1].sum().backward()
    reached = x.grad.abs().amax((0, 2)) > 0
    assert reached.tolist() == [t >= 19 - layers * 3 for t in range(20)]


def test_layer_compiles():
    layer, x = SlidingWindow(16, 2, window=4), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
