"""What is special to StreamingLLM: its limits, and positions counted inside the cache."""

import math

import pytest
import torch

from effattn_lite.layers.common import rotate, split_heads
from effattn_lite.layers.streaming_llm import StreamingLLM
from effattn_lite.ops import sliding_window, softmax_attention, streaming_llm
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("streaming_llm", **sizes))


@pytest.mark.parametrize("window", (48, 60))
def test_reduces_to_softmax_attention(window):
    x = inputs(H=4, HKV=2)
    got = streaming_llm(**x, window=window, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("window", (1, 5, 48))
def test_reduces_to_sliding_window(window):
    x = inputs(H=4, HKV=2)
    got = streaming_llm(**x, sinks=0, window=window, return_lse=True, impl="torch")
    assert relative_error(got, sliding_window(**x, window=window, return_lse=True, impl="torch")) < RTOL


def test_more_sinks_than_tokens():
    x = inputs()
    got = streaming_llm(**x, sinks=100, window=1, impl="torch")
    assert relative_error(got, softmax_attention(**x, impl="torch")) < RTOL


@pytest.mark.parametrize("packed", (False, True))
def test_forgets_all_but_sinks_and_window(packed):
    """What lies between cannot matter; each packed sequence has its own sinks."""
    x, more = inputs(B=1), {}
    if packed:
        x = {n: torch.cat((t, t), dim=1) for n, t in x.items()}
        more = dict(cu_seqlens=torch.tensor([0, 48, 96]))
    before = streaming_llm(**x, sinks=3, window=6, impl="torch", **more)[:, -1]
    for n in "kv":
        x[n][:, -45:-6] = torch.randn_like(x[n][:, -45:-6])
    assert max_error(streaming_llm(**x, sinks=3, window=6, impl="torch", **more)[:, -1], before) == 0
    x["v"][:, -46] += 1
    assert max_error(streaming_llm(**x, sinks=3, window=6, impl="torch", **more)[:, -1], before) > 1e-6


def test_gradient_of_sinks():
    x = [t.requires_grad_() for t in inputs(B=1, T=7, H=2, HKV=1, K=3, V=2).values()]
    assert torch.autograd.gradcheck(lambda *x: streaming_llm(*x, sinks=2, window=3, impl="torch"), x)


def test_window_must_hold_the_token():
    with pytest.raises(ValueError, match="window is 0"):
        streaming_llm(**inputs(), window=0)


@pytest.mark.parametrize("kv_heads, heads", ((2, 2), (1, 3)))
def test_layer_is_the_papers_loop(kv_heads, heads):
    """Token by token: a cache of unrotated keys, evicted behind the sinks, rotated by place at each use."""
    sinks, window, T = 3, 5, 21
    layer = StreamingLLM(12, heads, sinks=sinks, window=window, kv_heads=kv_heads, head_dim=4).double()
    x = torch.randn(2, T, 12, dtype=torch.float64)
    q, k, v = (
        split_heads(p(x), n)
        for p, n in ((layer.q_proj, heads), (layer.k_proj, kv_heads), (layer.v_proj, kv_heads))
    )
    kept, rows = [], []
    for t in range(T):
        kept.append(t)
        if len(kept) > sinks + window:
            kept.pop(sinks)
        place = torch.arange(len(kept))
        qt, kt = rotate(q[:, t : t + 1], place[-1:]), rotate(k[:, kept], place)
        kt, vt = (a.repeat_interleave(heads // kv_heads, dim=2) for a in (kt, v[:, kept]))
        p = torch.einsum("bihk,bjhk->bhij", qt, kt).div(math.sqrt(4)).softmax(-1)
        rows.append(torch.einsum("bhij,bjhv->bihv", p, vt))
    assert relative_error(layer(x), layer.o_proj(torch.cat(rows, dim=1).flatten(2))) < RTOL
    a, cache = layer.prefill(x[:, :4])
    b, cache = layer.prefill(x[:, 4:17], cache)
    c, cache = layer.prefill(x[:, 17:], cache)
    assert relative_error(torch.cat((a, b, c), dim=1), layer(x)) < RTOL
    assert cache["k"].shape[1] == sinks + window - 1


def test_layer_packs_as_it_runs_alone():
    layer, x = StreamingLLM(16, 2, sinks=2, window=4).double(), torch.randn(1, 30, 16, dtype=torch.float64)
    edges = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    alone = torch.cat((layer(x[:, :11]), layer(x[:, 11:])), dim=1)
    assert relative_error(layer(x, cu_seqlens=edges), alone) < RTOL


def test_layer_stays_bounded():
    layer, x = StreamingLLM(8, 1, sinks=2, window=4), torch.randn(1, 8)
    cache, sizes = None, []
    for _ in range(20):
        y, cache = layer.step(x, cache)
        sizes.append(sum(t.nbytes for t in cache.values()))
    assert sizes[4:] == [sizes[4]] * 16 and y.isfinite().all()


def test_layer_compiles():
    layer, x = StreamingLLM(16, 2, window=4), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
