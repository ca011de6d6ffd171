"""What is special to Quest: its bound, its selection by hand, its limits, decoding with a cache."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import KVCache, block_sparse_attention, quest, softmax_attention
from effattn_lite.ops.quest import select
from effattn_lite.reference import quest as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("quest", **sizes))


@pytest.mark.parametrize("budget, page_size", ((48, 16), (48, 7), (999, 48), (48, 1), (1, 60)))
def test_reduces_to_softmax_attention(budget, page_size):
    x = inputs(H=4, HKV=2)
    got = quest(**x, budget=budget, page_size=page_size, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("page_size", (1, 5, 16))
def test_a_bound_is_never_passed(page_size):
    """A page's score is at least every product in it; one token a page meets it."""
    x = make_inputs("quest", T=80, H=4, HKV=2)
    s = reference.score(x["q"], *reference.bounds(x["k"], page_size=page_size))  # [B, T, H, P]
    products = np.einsum("bthk,bjhk->bthj", x["q"], x["k"].repeat(2, axis=2))
    most = products.reshape(*products.shape[:3], -1, page_size).max(-1)
    assert (s >= most - 1e-12).all()
    assert (np.abs(s - most).max() < 1e-12) == (page_size == 1)


def test_bound_by_hand():
    """Keys (1, -2) and (-3, 4): (2, -1) is bounded by 2 * 1 - 1 * -2 = 4, which its first product meets."""
    low, high = reference.bounds(np.array([[1.0, -2], [-3, 4]]).reshape(1, 2, 1, 2), page_size=2)
    assert low.tolist() == [[[[-3, -2]]]] and high.tolist() == [[[[1, 4]]]]
    for q, bound in (((2, -1), 4), ((1, 1), 5), ((-1, 0), 3)):
        assert reference.score(np.array(q, float).reshape(1, 1, 1, 2), low, high).item() == bound


def test_selection_by_hand():
    """One channel, pages of 2 with ends (0, 2), (1, 3), (-9, 0): the past of token 6."""
    k = torch.tensor([0.0, 2, 3, 1, 0, -9, 5]).view(1, 7, 1, 1)
    for sign, ranked in ((1.0, [3, 1, 0, 2]), (-1.0, [3, 2, 0, 1])):
        for n in (1, 2, 3, 4, 9):
            chosen = select(torch.full((1, 7, 1, 1), sign), k, budget=2 * n, page_size=2, impl="torch")
            assert chosen.shape == (1, 7, 1, min(n, 4)) and chosen.dtype == torch.int32
            assert chosen[0, 6, 0].tolist() == ranked[:n]
            assert chosen[0, 1, 0].tolist() == [0, -1, -1, -1][:n]


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_ties_go_to_the_lower_page(impl, device):
    """Equal scores, of both signs of zero among them."""
    q = torch.ones(1, 40, 2, 8, device=device)
    for k in (torch.zeros_like(q), -torch.zeros_like(q), q):
        chosen = select(q, k, budget=24, page_size=8, impl=impl)
        assert (chosen[0, 35:].cpu() == torch.tensor([4, 0, 1])).all()


@pytest.mark.parametrize("sizes", (dict(T=63), dict(T=7), dict(T=96, H=6, HKV=2)), ids=str)
@pytest.mark.parametrize("budget, page_size", ((24, 8), (17, 5), (6, 1), (1, 16)))
def test_selection_equals_reference(sizes, budget, page_size):
    x = make_inputs("quest", **sizes)
    want = reference.select(x["q"], x["k"], budget=budget, page_size=page_size)
    x = to_torch(x)
    got = select(x["q"], x["k"], budget=budget, page_size=page_size, impl="torch")
    assert np.array_equal(got.numpy(), want)


def needles(T=512, K=32, seed=0):
    """One query, and keys of which a few answer it, none of the 64 newest among them."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(1, 1, 1, K)), rng.normal(size=(1, T, 1, K))
    k[:, rng.choice(T - 64, 5, replace=False)] += 1.5 * q[0, 0]
    return torch.tensor(q), torch.tensor(k)


@pytest.mark.parametrize("seed", range(5))
def test_the_pages_with_the_weight_are_chosen(seed):
    """64 of 512 tokens, in pages, hold nearly all that the 64 heaviest hold; the 64 newest hold little."""
    q, k = needles(seed=seed)
    p = torch.softmax((k[0, :, 0] @ q[0, 0, 0]) * 32**-0.5, 0)
    pages = p.view(-1, 8).sum(1)
    mass = pages[select(q, k, budget=64, page_size=8, impl="torch")[0, 0, 0].long()].sum()
    best = p.topk(64)[0].sum()
    assert mass > 0.9 * best and p[-64:].sum() < 0.25 * best, (mass, best, p[-64:].sum())


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("first", (1, 22))
def test_decoding_with_a_cache(first, impl, device):
    """Token by token over a cache, from any prompt on, equals the text; and so does its last token alone."""
    x = {name: t.float().to(device) for name, t in inputs(T=23, H=4, HKV=2).items()}
    q, k, v = x.values()
    options = dict(budget=12, page_size=4, impl=impl, return_lse=True)
    whole = quest(**x, **options)
    cache = KVCache(k[:, :first], v[:, :first])
    for t in range(first, 23):
        cache.append(k[:, t], v[:, t])
        if t % 5 == 2 or t > 20:  # whole pages may pass between two calls
            o, lse = quest(q[:, t], cache, **options)
            assert o.shape == (2, 4, 24) and lse.shape == (2, 4)
            assert relative_error((o, lse), (whole[0][:, t], whole[1][:, t])) < 1e-5
    last = quest(q[:, -3:], k=k, v=v, **options)
    assert relative_error(last, tuple(part[:, -3:] for part in whole)) < 1e-5


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_selection_and_attention_apart(impl, device):
    x = {name: t.float().to(device) for name, t in inputs(B=1, T=30, H=4, HKV=2).items()}
    pages = select(x["q"], x["k"], budget=24, page_size=8, impl=impl)
    want = block_sparse_attention(
        **x, block_indices=pages, block_size=8, query_block_size=1, impl="torch", return_lse=True
    )
    assert relative_error(quest(**x, budget=24, page_size=8, return_lse=True, impl=impl), want) < 1e-5


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_a_page_that_nobody_chose_is_not_read(impl, device):
    x = {name: t.float().to(device) for name, t in inputs(B=1, T=40, H=1, K=8, V=8).items()}
    x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    x["k"][:, 8:16] *= -1
    want = quest(**x, budget=16, page_size=8, impl=impl)
    x["v"][:, 8:16] = torch.nan
    got = quest(**x, budget=16, page_size=8, impl=impl)
    assert got[:, 16:].isfinite().all() and max_error(got[:, 16:], want[:, 16:]) == 0


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_an_empty_cache(impl, device):
    x = {name: t.float().to(device) for name, t in inputs(T=1).items()}
    cache = KVCache(x["k"][:, :0], x["v"][:, :0])
    o, lse = quest(x["q"][:, 0], cache, budget=16, return_lse=True, impl=impl)
    assert (o == 0).all() and lse.isneginf().all()


def test_errors():
    x = inputs()
    cache = KVCache(x["k"], x["v"])
    for name in ("budget", "page_size"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected >= 1"):
            quest(**x, **dict(budget=4, page_size=2) | {name: 0})
    with pytest.raises(ValueError, match="neither a cache nor both k and v"):
        quest(x["q"], k=x["k"], budget=16)
    with pytest.raises(ValueError, match="expected neither beside it"):
        quest(x["q"][:, 0], cache, k=x["k"], budget=16)
    with pytest.raises(ValueError, match=r"q has shape \(2, 48, 2, 16\), expected 3 axes"):
        quest(x["q"], cache, budget=16)
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 16\).*\(2, 2, 16\) as the cache"):
        quest(x["q"][:1, 0], cache, budget=16)
    with pytest.raises(ValueError, match="q has 3 heads, expected a multiple of k's 2"):
        quest(x["q"][:, 0, [0, 0, 0]], cache, budget=16)
    with pytest.raises(TypeError, match="q is torch.float32, expected torch.float64 as the cache"):
        quest(x["q"][:, 0].float(), cache, budget=16)
