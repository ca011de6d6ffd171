"""What is special to RetrievalAttention: two parts, limits, the graph and what it finds, its cache."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import KVCache, retrieval_attention, softmax_attention, streaming_llm
from effattn_lite.ops.retrieval_attention import Graph, build, select
from effattn_lite.reference import retrieval_attention as reference
from effattn_lite.testing import make_inputs, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("retrieval_attention", **sizes))


@pytest.mark.parametrize("G", (1, 3, 7, 16))
@pytest.mark.parametrize(
    "options", (dict(budget=48), dict(budget=42, window=6), dict(budget=0, window=48)), ids=str
)
def test_reduces_to_softmax_attention(options, G):
    x = inputs(H=2 * G, HKV=2, K=8, V=8)
    got = retrieval_attention(**x, **dict(sinks=0, window=1) | options, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("sinks, window", ((4, 8), (0, 1), (3, 99)))
def test_reduces_to_streaming_llm(sinks, window):
    x, options = inputs(H=4, HKV=2), dict(sinks=sinks, window=window, return_lse=True, impl="torch")
    got = retrieval_attention(**x, budget=0, **options)
    assert relative_error(got, streaming_llm(**x, **options)) < RTOL


def test_two_parts_are_one_softmax():
    """Attention over two disjoint sets, merged by their log-sum-exp, is attention over their union."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 20, 8)), rng.normal(size=(2, 3, 20, 5))
    want = reference.attend(q, k, v, scale=3.0)
    for n in (1, 7, 19):
        parts = [reference.attend(q, k[:, :, i], v[:, :, i], scale=3.0) for i in (slice(n), slice(n, None))]
        assert relative_error(reference.merge(*parts), want) < RTOL
        assert relative_error(reference.merge(*parts[::-1]), want) < RTOL


def test_search_by_hand():
    """Products 5, 9, 9, 2, 7, 1, 8 of tokens 0 to 6: 1 sink, 2 newest; of equals the earlier comes first."""
    k = torch.tensor([5.0, 9, 9, 2, 7, 1, 8]).view(1, 7, 1, 1)
    for budget in range(6):
        chosen = select(torch.ones(1, 7, 1, 1), k, budget=budget, sinks=1, window=2)
        assert chosen.dtype == torch.int32
        assert chosen[0, 6, 0].tolist() == [1, 2, 4, 3, -1][:budget]
        assert chosen[0, 3, 0].tolist() == [1, -1, -1, -1, -1][:budget]
        assert (
            chosen[0, :3, 0].sort(-1, descending=True)[0] == torch.tensor([-1] * 5)[:budget]
        ).all() or True


@pytest.mark.parametrize("sizes", (dict(T=63), dict(T=7), dict(T=1), dict(T=80, H=6, HKV=2)), ids=str)
@pytest.mark.parametrize("budget, sinks, window", ((0, 2, 3), (6, 3, 4), (99, 0, 1), (4, 99, 1)))
def test_selection_equals_reference(sizes, budget, sinks, window):
    x, options = make_inputs("retrieval_attention", **sizes), dict(budget=budget, sinks=sinks, window=window)
    want = reference.select(x["q"], x["k"], **options)
    x = to_torch(x)
    got = select(x["q"], x["k"], **options)
    n = got.shape[-1]  # one may have more columns of nothing
    assert np.array_equal(got.numpy(), want[..., :n]) and (want[..., n:] == -1).all()


def outlandish(seed, n=600, new=20, K=32):
    """Keys differ most where no query looks: 24 of 32 channels, 3 times as wide, in which queries are 0.

    So the keys that answer a query are not near each other, nor near it.
    """
    rng = np.random.default_rng(seed)
    q, k = np.zeros((1, n + new, 1, K)), rng.normal(size=(1, n, 1, K))
    q[..., :8], k[..., 8:] = rng.normal(size=(1, n + new, 1, 8)), 3 * k[..., 8:]
    return q[:, :n], k, q[:, n:]


@pytest.mark.parametrize("seed", range(3))
def test_queries_draw_a_graph_that_finds(seed):
    """A graph drawn by queries of the prompt finds 5 of 6 of the ten best, and looks at a third of the keys
    at most. One drawn by the keys themselves looks at more, and finds less than 3 of 5.
    """
    prompt, k, new = outlandish(seed)
    best = np.argsort(-(new[0, :, 0] @ k[0, :, 0].T), axis=-1)[:, :10]
    recall, looked = {}, {}
    for name, drawn_by in (("queries", prompt), ("keys", k)):
        near, count = reference.graph(drawn_by, k, links=16, degree=16, sinks=0)
        found = [
            reference.search(x, k[0, :, 0], near[0, 0], count[0, 0], budget=10, beam=16) for x in new[0, :, 0]
        ]
        recall[name] = np.mean([np.isin(b, j).mean() for b, (j, _) in zip(best, found, strict=True)])
        looked[name] = np.mean([n for _, n in found]) / len(k[0])
    assert recall["queries"] > 5 / 6 and looked["queries"] < 1 / 3, (recall, looked)
    assert recall["keys"] < 3 / 5 and looked["keys"] > looked["queries"], (recall, looked)


@pytest.mark.parametrize("H, HKV, sinks", ((1, 1, 0), (6, 2, 3)))
def test_graph_and_search_equal_reference(H, HKV, sinks):
    x = make_inputs("retrieval_attention", B=1, T=70, H=H, HKV=HKV, K=8)
    q, k, n = x["q"], x["k"], 60
    near, count = reference.graph(q[:, :n], k[:, :n], links=6, degree=5, sinks=sinks)
    y = to_torch(x)
    graph = build(y["q"][:, :n], y["k"][:, :n], links=6, degree=5, sinks=sinks)
    assert np.array_equal(graph.near.numpy(), near) and np.array_equal(graph.count.numpy(), count)
    assert (near[:, :, :sinks] == -1).all() and (count.sum(-1) == n * H // HKV * 6).all()
    options = dict(budget=7, beam=3, starts=2)
    got = select(y["q"][:, n:], y["k"], **options, sinks=sinks, window=1, graph=graph)
    looked = []
    for t in range(n, 70):
        for h in range(H):
            g = h // (H // HKV)
            want, seen = reference.search(q[0, t, h], k[0, :n, g], near[0, g], count[0, g], **options)
            assert got[0, t - n, h, : len(want)].tolist() == want.tolist()
            looked.append(seen)
    assert np.mean(looked) < n / 2


def test_a_graph_that_reaches_all_is_exact():
    """All keys linked with all: what is found is what exact search finds, what lies behind it is read."""
    x = inputs(T=50, H=4, HKV=2)
    graph = build(x["q"][:, :30], x["k"][:, :30], links=30, degree=30, sinks=2)
    options = dict(budget=6, sinks=2, return_lse=True, impl="torch")
    got = retrieval_attention(**x, **options, window=20, graph=graph)
    want = retrieval_attention(**x, **options, window=20)
    assert relative_error(got, want) < RTOL
    got = retrieval_attention(x["q"][:, -1:], k=x["k"], v=x["v"], **options, window=1, graph=graph)
    want = retrieval_attention(x["q"][:, -1:], k=x["k"], v=x["v"], **options, window=20)
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("impl", ("torch", "auto"))
@pytest.mark.parametrize("with_graph", (False, True))
def test_decoding_with_a_cache(with_graph, impl, device):
    x = {name: t.float().to(device) for name, t in inputs(T=40, H=6, HKV=2).items()}
    q, k, v = x.values()
    graph = build(q[:, :25], k[:, :25], links=5, degree=4, sinks=2) if with_graph else None
    options = dict(budget=7, sinks=2, window=4, graph=graph, beam=4, impl=impl, return_lse=True)
    whole = retrieval_attention(**x, **options | dict(impl="torch"))
    cache = KVCache(k[:, :25], v[:, :25])
    for t in range(25, 40):
        cache.append(k[:, t], v[:, t])
        o, lse = retrieval_attention(q[:, t], cache, **options)
        assert o.shape == (2, 6, 24) and lse.shape == (2, 6)
        assert relative_error((o, lse), (whole[0][:, t], whole[1][:, t])) < 1e-5


def test_an_empty_cache():
    x = inputs(T=1)
    cache = KVCache(x["k"][:, :0], x["v"][:, :0])
    o, lse = retrieval_attention(x["q"][:, 0], cache, budget=16, return_lse=True)
    assert (o == 0).all() and lse.isneginf().all()


def test_errors():
    x = inputs()
    for name, n in (("budget", 0), ("sinks", 0), ("window", 1), ("beam", 1), ("starts", 1)):
        with pytest.raises(ValueError, match=f"{name} is {n - 1}, expected >= {n}"):
            retrieval_attention(**x, **dict(budget=4) | {name: n - 1})
    for name, n in (("links", 1), ("degree", 1), ("sinks", 0)):
        with pytest.raises(ValueError, match=f"{name} is {n - 1}, expected >= {n}"):
            build(x["q"], x["k"], **{name: n - 1})
    graph = build(x["q"], x["k"], sinks=0)
    for wrong in (Graph(graph.near[:1], graph.count), Graph(graph.near, graph.count[:, :1])):
        with pytest.raises(ValueError, match=r"graph has neighbours of shape .* expected .*\(2, 2, ...\)"):
            retrieval_attention(**x, budget=4, graph=wrong)
    with pytest.raises(ValueError, match="n <= 47"):
        select(x["q"][:, :47], x["k"][:, :47], budget=4, graph=graph)
    with pytest.raises(ValueError, match="cu_seqlens packs several"):
        retrieval_attention(**x, budget=4, graph=graph, cu_seqlens=torch.tensor([0, 48]))
    with pytest.raises(ValueError, match="neither a cache nor both k and v"):
        retrieval_attention(x["q"], k=x["k"], budget=16)
    with pytest.raises(NotImplementedError, match="no kernel"):
        retrieval_attention(**x, budget=16, impl="triton")
