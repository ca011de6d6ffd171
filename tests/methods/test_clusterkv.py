"""What is special to ClusterKV: clusters and their choice by hand, limits, what it finds, its cache."""

import sys

import numpy as np
import pytest
import torch

from effattn_lite.ops import KVCache, clusterkv, softmax_attention, streaming_llm
from effattn_lite.ops.clusterkv import cluster, select
from effattn_lite.reference import clusterkv as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
OPTIONS = dict(prompt=24, every=10, sinks=2, cluster_size=4, iterations=3)


def inputs(**sizes):
    return to_torch(make_inputs("clusterkv", **sizes))


@pytest.mark.parametrize("G", (1, 3, 7, 16))
@pytest.mark.parametrize("budget, prompt, every", ((48, 24, 10), (99, 0, 1), (48, 3, 320)))
def test_reduces_to_softmax_attention(budget, prompt, every, G):
    x = inputs(H=2 * G, HKV=2, K=8, V=8)
    options = OPTIONS | dict(budget=budget, prompt=prompt, every=every)
    got = clusterkv(**x, **options, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("sinks", (0, 1, 5, 99))
def test_reduces_to_streaming_llm(sinks):
    """No budget, and every token clustered at once: what is left are the sinks and the token itself."""
    x, more = inputs(H=4, HKV=2), dict(return_lse=True, impl="torch")
    got = clusterkv(**x, budget=0, prompt=0, every=1, sinks=sinks, **more)
    assert relative_error(got, streaming_llm(**x, sinks=sinks, window=1, **more)) < RTOL


def test_a_prompt_is_read_whole():
    """Before the first written token there is no cluster: whatever the budget, attention is full."""
    x = inputs(T=24)
    got = clusterkv(**x, **OPTIONS, budget=0, impl="torch")
    assert relative_error(got, softmax_attention(**x, impl="torch")) < RTOL


def test_clusters_by_hand():
    """Two directions, of two lengths each: the cosine sees directions alone, the centre is a mean of keys."""
    k = torch.tensor([[1.0, 0], [0, 1], [5, 0], [0, 3]]).view(1, 4, 1, 2)
    # first centres: (0, 1) and (0, 3); of equal cosines the lower cluster has all, the other keeps its centre
    assert cluster(k, cluster_size=2, iterations=0)[1].flatten().tolist() == [0, 0, 0, 0]
    centres, own = cluster(k, cluster_size=2, iterations=1)
    assert own.flatten().tolist() == [0, 1, 0, 1] and centres[0, :, 0].tolist() == [[1.5, 1], [0, 3]]
    centres, own = cluster(k, cluster_size=2, iterations=2)
    assert own.flatten().tolist() == [0, 1, 0, 1] and centres[0, :, 0].tolist() == [[3, 0], [0, 2]]
    centres, own = cluster(k[:, [0, 2, 1, 3]], cluster_size=2, iterations=2)  # keys (5, 0) and (0, 3)
    assert own[0, :, 0].tolist() == [0, 0, 1, 1]
    assert centres[0, :, 0].tolist() == [[3, 0], [0, 2]]


def test_choice_by_hand():
    """Clusters {2, 3, 5} and {4, 6} behind 2 sinks; q prefers the second, so it comes first."""
    k = torch.zeros(1, 8, 1, 2)
    k[0, [2, 3, 5], 0], k[0, [4, 6], 0] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    q = torch.tensor([1.0, 2]).expand(1, 8, 1, 2)
    options = dict(prompt=7, sinks=2, cluster_size=3, iterations=2, every=9)
    for budget in range(7):
        chosen = select(q, k, **options, budget=budget)
        assert chosen.shape == (1, 8, 1, min(budget, 5)) and chosen.dtype == torch.int32
        assert chosen[0, 7, 0].tolist() == [4, 6, 2, 3, 5][:budget]
        assert (chosen[0, :7] == -1).all()
        other = select(-q, k, **options, budget=budget)
        assert other[0, 7, 0].tolist() == [2, 3, 5, 4, 6][:budget]


def test_equal_scores_go_to_the_lower_cluster():
    """All keys 0: one cluster has them all, and gives its earliest; all queries 0: clusters in order."""
    x = inputs(T=40)
    options = OPTIONS | dict(budget=7)
    chosen = select(x["q"], torch.zeros_like(x["k"]), **options)[:, 34:]
    assert (chosen == torch.arange(2, 9)).all()
    chosen = select(torch.zeros_like(x["q"]), x["k"], **options | dict(budget=99))[:, -1]
    own = cluster(x["k"][:, 2:24], cluster_size=4, iterations=3)[1]
    in_order = own.sort(dim=1, stable=True)[1].transpose(1, 2) + 2
    assert torch.equal(chosen[..., :22].long(), in_order)


@pytest.mark.parametrize("sizes", (dict(T=63), dict(T=7), dict(T=1), dict(T=80, H=6, HKV=2)), ids=str)
@pytest.mark.parametrize("budget", (0, 5, 30, 200))
def test_selection_equals_reference(sizes, budget):
    x, options = make_inputs("clusterkv", **sizes), OPTIONS | dict(budget=budget)
    want = reference.select(x["q"], x["k"], **options)
    x = to_torch(x)
    got = select(x["q"], x["k"], **options)
    assert got.dtype == torch.int32 and np.array_equal(got.numpy(), want)


def test_clusters_at_rest():
    """When nothing moves any more, each centre is the mean of its keys, and no key has a nearer one."""
    x = make_inputs("clusterkv", T=120, K=4)["k"]
    (centres, own), more = (reference.cluster(x, cluster_size=10, iterations=n) for n in (60, 61))
    assert np.array_equal(own, more[1]) and max_error(centres, more[0]) == 0
    for b in range(2):
        for h in range(2):
            for c in range(12):
                mine = x[b, own[b, :, h] == c, h]
                assert len(mine) == 0 or max_error(centres[b, c, h], mine.mean(0)) < 1e-12
    cosines = np.einsum("bjhk,bchk->bjhc", reference.direction(x), reference.direction(centres))
    assert np.array_equal(cosines.argmax(-1), own)
    got = cluster(torch.tensor(x), cluster_size=10, iterations=60)
    assert max_error(got[0], centres) < 1e-12 and np.array_equal(got[1].numpy(), own)


@pytest.mark.parametrize("seed", range(4))
def test_the_heaviest_tokens_are_found(seed):
    """Keys of 30 meanings strewn over a text, as no page has them: of the 40 that answer best, 64 clustered
    tokens of 1200 hold most; 64 tokens by chance, 1 in 19.
    """
    g = torch.Generator().manual_seed(seed)
    meanings = torch.randn(30, 32, generator=g)
    k = meanings[torch.randint(30, (1, 1200, 1), generator=g)] + 0.5 * torch.randn(
        1, 1200, 1, 32, generator=g
    )
    q = meanings[:4].view(1, 4, 1, 32) + 0.5 * torch.randn(1, 4, 1, 32, generator=g)
    k = torch.cat((k, q), dim=1)
    chosen = select(q, k, budget=64, prompt=1200, sinks=0, cluster_size=20)
    best = torch.einsum("tk,jk->tj", q[0, :, 0], k[0, :1200, 0]).topk(40)[1]
    found = [np.isin(b, c).mean() for b, c in zip(best.numpy(), chosen[0, :, 0].numpy(), strict=True)]
    by_chance = [np.isin(b, torch.randperm(1200, generator=g)[:64]).mean() for b in best.numpy()]
    assert np.mean(found) > 0.7 and np.mean(by_chance) < 0.2, (found, by_chance)


@pytest.mark.parametrize("impl", ("torch", "auto"))
@pytest.mark.parametrize("first", (1, 26))
def test_decoding_with_a_cache(first, impl, device):
    """Token by token over a cache equals the text; what is behind its end is forgotten."""
    x = {name: t.float().to(device) for name, t in inputs(T=50, H=6, HKV=2).items()}
    q, k, v = x.values()
    options = OPTIONS | dict(budget=9, impl=impl, return_lse=True)
    whole = clusterkv(**x, **options | dict(impl="torch"))
    cache = KVCache(k[:, :first], v[:, :first])
    for _ in range(2):
        for t in range(first, 50):
            cache.append(k[:, t], v[:, t])
            if t % 5 == 2 or t > 47:
                o, lse = clusterkv(q[:, t], cache, **options)
                assert o.shape == (2, 6, 24) and lse.shape == (2, 6)
                assert relative_error((o, lse), (whole[0][:, t], whole[1][:, t])) < 1e-5
        cache.truncate(first)
    last = clusterkv(q[:, -3:], k=k, v=v, **options)
    assert relative_error(last, tuple(part[:, -3:] for part in whole)) < 1e-5


def test_clusters_are_made_once(monkeypatch):
    """While 20 tokens are written, the prompt is clustered once, and each whole span after it once."""
    seen, module = [], sys.modules[clusterkv.__module__]
    monkeypatch.setattr(
        module, "cluster", lambda k, **options: seen.append(k.shape[1]) or cluster(k, **options)
    )
    x = inputs(T=50)
    cache = KVCache(x["k"][:, :25], x["v"][:, :25])
    for t in range(25, 50):
        cache.append(x["k"][:, t], x["v"][:, t])
        clusterkv(x["q"][:, t], cache, **OPTIONS, budget=9)
    assert seen == [22, 10, 10]
    cache.rewrite(x["k"][:, -10:], x["v"][:, -10:])  # tokens 40 to 49: the last span is touched
    clusterkv(x["q"][:, -1], cache, **OPTIONS, budget=9)
    assert seen == [22, 10, 10, 10]


def test_an_empty_cache():
    x = inputs(T=1)
    cache = KVCache(x["k"][:, :0], x["v"][:, :0])
    o, lse = clusterkv(x["q"][:, 0], cache, budget=16, prompt=0, return_lse=True)
    assert (o == 0).all() and lse.isneginf().all()


def test_errors():
    x = inputs()
    for name, n in (("budget", 0), ("prompt", 0), ("every", 1), ("sinks", 0), ("cluster_size", 1)):
        with pytest.raises(ValueError, match=f"{name} is {n - 1}, expected >= {n}"):
            clusterkv(**x, **OPTIONS | dict(budget=4) | {name: n - 1})
    with pytest.raises(ValueError, match="iterations is -1, expected >= 0"):
        select(x["q"], x["k"], **OPTIONS | dict(budget=4, iterations=-1))
    with pytest.raises(ValueError, match="neither a cache nor both k and v"):
        clusterkv(x["q"], k=x["k"], budget=16, prompt=4)
    with pytest.raises(ValueError, match="expected neither beside it"):
        clusterkv(x["q"][:, 0], KVCache(x["k"], x["v"]), k=x["k"], budget=16, prompt=4)
    with pytest.raises(NotImplementedError, match="no kernel"):
        clusterkv(**x, budget=16, prompt=4, impl="triton")
