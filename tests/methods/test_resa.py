"""What is special to ReSA: pages of a group, how many, its limits, and rectification in a small model."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import KVCache, quest, resa, softmax_attention
from effattn_lite.ops.resa import rectify, select
from effattn_lite.reference import resa as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("resa", **sizes))


@pytest.mark.parametrize("options", (dict(ratio=1), dict(min_pages=99), dict(ratio=1, page_size=7)), ids=str)
def test_reduces_to_softmax_attention(options):
    x = inputs(H=4, HKV=2)
    got = resa(**x, **dict(min_pages=1) | options, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("pages", (1, 3))
def test_reduces_to_quest(pages):
    """One query head a key head, a count of pages that does not grow."""
    x = inputs(H=3)
    got = resa(**x, ratio=0, min_pages=pages, page_size=5, return_lse=True, impl="torch")
    want = quest(**x, budget=5 * pages, page_size=5, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


def test_number_of_pages():
    """A tenth, rounded up, but 16 where there are so many; 0.07 * 100 is 7, whatever floats say."""
    for n, want in ((1, 1), (15, 15), (16, 16), (17, 16), (160, 16), (161, 17), (1000, 100), (1001, 101)):
        assert reference.count(n) == want
    assert reference.count(100, ratio=0.07, min_pages=1) == 7 and 0.07 * 100 > 7
    # a key a page: the op reads as many as the reference says
    q = torch.randn(1, 200, 1, 8)
    chosen = select(q, q, ratio=0.1, min_pages=4, page_size=1, impl="torch")
    want = reference.count(np.arange(1, 201), ratio=0.1, min_pages=4)
    assert (chosen >= 0).sum(-1)[0, :, 0].tolist() == want.tolist() and chosen.shape[-1] == 20


@pytest.mark.parametrize("sizes", (dict(T=63), dict(T=7), dict(T=96, H=6, HKV=2)), ids=str)
@pytest.mark.parametrize("ratio, min_pages, page_size", ((0.3, 1, 8), (0, 3, 5), (0.1, 2, 1)))
def test_selection_equals_reference(sizes, ratio, min_pages, page_size):
    x, options = make_inputs("resa", **sizes), dict(ratio=ratio, min_pages=min_pages, page_size=page_size)
    want = reference.select(x["q"], x["k"], **options)
    x = to_torch(x)
    got = select(x["q"], x["k"], **options, impl="torch")
    assert got.dtype == torch.int32 and np.array_equal(got.numpy(), want)


def test_a_group_shares_its_pages():
    """Two heads that want different pages: the mean query decides for both."""
    k = torch.zeros(1, 5, 1, 2)
    k[0, 1, 0], k[0, 2, 0] = torch.tensor([2.0, 0]), torch.tensor([0, 1.0])
    q = torch.zeros(1, 1, 2, 2)
    q[0, 0, 0], q[0, 0, 1] = torch.tensor([1.0, 0]), torch.tensor([0, 3.0])
    options = dict(ratio=0, min_pages=2, page_size=1, impl="torch")
    assert select(q, k, **options).tolist() == [[[[4, 2]]]]  # 3 / 2 * 1 against 1 / 2 * 2
    assert select(q[:, :, :1], k, **options).tolist() == [[[[4, 1]]]]


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_decoding_with_a_cache(impl, device):
    x = {name: t.float().to(device) for name, t in inputs(T=23, H=6, HKV=2).items()}
    q, k, v = x.values()
    options = dict(ratio=0.3, min_pages=2, page_size=4, impl=impl, return_lse=True)
    whole = resa(**x, **options)
    cache = KVCache(k[:, :5], v[:, :5])
    for t in range(5, 23):
        cache.append(k[:, t], v[:, t])
        if t % 5 == 2 or t > 20:
            got = resa(q[:, t], cache, **options)
            assert relative_error(got, tuple(part[:, t] for part in whole)) < 1e-5


class Model:
    """Two layers of attention without projections to speak of: what one reads, the next one's keys are."""

    def __init__(self, seed=0, width=16):
        g = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(2, 3, width, width, generator=g, dtype=torch.float64) * width**-0.5

    def pass_through(self, x, attend):
        """x [B, n, width] through both layers; attend(layer, q, k, v) -> o, all [B, n, 2, 8]."""
        for layer, weights in enumerate(self.weights):
            q, k, v = (2 * (x @ w).unflatten(-1, (2, 8)) for w in weights)
            x = x + attend(layer, q, k, v).flatten(2)
        return x

    def dense(self, x):
        """Outputs, and the cache that a dense model has: keys and values of both layers."""
        caches = []

        def attend(layer, q, k, v):
            caches.append(KVCache(k, v))
            return softmax_attention(q, k, v, impl="torch")

        return self.pass_through(x, attend), caches


def sparse_decode(model, x, start, every=None):
    """Decode the tokens from `start` on, one at a time; rectify every so many."""
    outputs, (first, caches) = [], model.dense(x[:, :start])
    options = dict(ratio=0, min_pages=2, page_size=4, impl="torch")

    def one(layer, q, k, v):
        caches[layer].append(k, v)
        return resa(q[:, 0], caches[layer], **options)[:, None]

    def again(layer, q, k, v):
        return rectify(q, k, v, caches[layer], impl="torch")

    for t in range(start, x.shape[1]):
        outputs.append(model.pass_through(x[:, t : t + 1], one))
        if every and (t + 1 - start) % every == 0:
            outputs[-every:] = model.pass_through(x[:, t + 1 - every : t + 1], again).split(1, dim=1)
    return torch.cat([first, *outputs], dim=1), caches


def test_rectification_rewrites_exactly():
    """Sparse reading drifts the second layer's keys; after a rectification the cache is the dense model's."""
    model, x = Model(), torch.randn(2, 52, 16, dtype=torch.float64)
    want, dense = model.dense(x)
    drifted, caches = sparse_decode(model, x, 20)
    assert max_error(caches[0].k, dense[0].k) < RTOL  # the first layer's keys come before any attention
    assert max_error(caches[1].k, dense[1].k) > 1e-2 and max_error(drifted, want) > 1e-2
    mended, caches = sparse_decode(model, x, 20, every=8)
    for got, cache in zip(caches, dense, strict=True):
        assert relative_error((got.k, got.v), (cache.k, cache.v)) < RTOL
    assert relative_error(mended, want) < RTOL


def test_rectified_pages_are_bounded_anew():
    """The bounds of rewritten pages are not those of what was there before."""
    x = inputs(T=40)
    cache, q = KVCache(-x["k"], x["v"]), x["q"][:, -1]
    options = dict(ratio=0, min_pages=3, page_size=4, impl="torch")
    resa(q, cache, **options)
    rectify(x["q"], x["k"], x["v"], cache, impl="torch")
    assert relative_error(resa(q, cache, **options), resa(**x, **options)[:, -1]) < RTOL


def test_rectification_equals_reference():
    x, n = make_inputs("resa", H=4, HKV=2), 9
    old = make_inputs("resa", H=4, HKV=2, seed=1)
    new = {name: t[:, -n:] for name, t in x.items()}
    want, _ = reference.rectify(*new.values(), old["k"].copy(), old["v"].copy())
    cache = KVCache(torch.tensor(old["k"]), torch.tensor(old["v"]))
    assert relative_error(rectify(*to_torch(new).values(), cache, impl="torch"), want) < RTOL
    assert relative_error(cache.k[:, :-n], old["k"][:, :-n]) == relative_error(cache.k[:, -n:], new["k"]) == 0


def test_errors():
    x = inputs()
    with pytest.raises(ValueError, match="ratio is 1.5, expected 0 to 1"):
        resa(**x, ratio=1.5)
    for name in ("min_pages", "page_size"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected >= 1"):
            resa(**x, **{name: 0})
    cache = KVCache(x["k"][:, :5], x["v"][:, :5])
    for tensors, match in (
        ((x["q"], x["k"], x["v"]), "at most T = 5"),
        ((x["q"][:, :2], x["k"][:, :3], x["v"][:, :3]), r"expected n = 2 tokens as q"),
    ):
        with pytest.raises(ValueError, match=match):
            rectify(*tensors, cache)
        assert max_error(cache.k, x["k"][:, :5]) == 0
