"""What is special to MagicPIG: chances of its hashes, what its sums average to, its limits, its tables."""

import sys

import numpy as np
import pytest
import torch

from effattn_lite.ops import KVCache, magicpig, softmax_attention
from effattn_lite.ops.engines import decode
from effattn_lite.ops.magicpig import draw_planes, probability
from effattn_lite.reference import magicpig as reference
from effattn_lite.testing import make_inputs, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("magicpig", **sizes))


@pytest.mark.parametrize("G", (1, 3, 7, 16))
@pytest.mark.parametrize("options", (dict(window=48), dict(sinks=40, window=8), dict(prompt=48)), ids=str)
def test_reduces_to_softmax_attention(options, G):
    x = inputs(H=2 * G, HKV=2, K=8, V=8)
    planes = x.pop("planes")
    options = dict(bits=2, prompt=0, sinks=0, window=1) | options
    got = magicpig(**x, planes=planes, **options, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_buckets_by_hand():
    """Two tables of two planes: the sides are the bits, the lowest first; on no side is side 0."""
    planes = np.array([[1.0, 0], [0, 1], [0, -1], [1, 1]])
    x = np.array([[2.0, -1], [-1, 3], [0, 0], [1, -1]])
    assert reference.hashes(x, planes, bits=2).tolist() == [[1, 3], [2, 2], [0, 0], [1, 1]]


@pytest.mark.parametrize("bits, tables", ((1, 2), (2, 6), (3, 4), (10, 150)))
def test_chance_of_two_collisions(bits, tables):
    """The closed form is the binomial's, its digits those of the sum over where the second collision is."""
    cosine = np.linspace(-1, 1, 41)
    u = reference.probability(cosine, bits=bits, tables=tables)
    x = (1 - np.arccos(cosine) / np.pi) ** bits
    plain = 1 - (1 - x) ** tables - tables * x * (1 - x) ** (tables - 1)
    assert np.abs(u - plain).max() < 1e-13 and (np.diff(u) >= 0).all()
    assert u[0] == 0 and abs(u[-1] - 1) < 1e-15
    i = np.arange(tables - 1)
    summed = (x[:, None] ** 2 * (i + 1) * (1 - x[:, None]) ** i).sum(-1)
    small = (summed > 0) & (summed < 1e-6)
    assert np.allclose(u[small], summed[small], rtol=1e-7, atol=0)
    got = probability(torch.tensor(cosine), bits=bits, tables=tables)
    assert np.allclose(got.numpy(), u, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits, tables", ((2, 6), (4, 30)))
@pytest.mark.parametrize("cosine", (-0.3, 0.2, 0.6, 0.95))
def test_chance_against_a_count(cosine, bits, tables):
    """4000 draws of the planes: as many share two buckets as the formula says, within 4 standard errors."""
    rng, n = np.random.default_rng(0), 4000
    x = np.zeros((2, 8))
    x[0, 0], x[1, 0], x[1, 1] = 3, cosine, (1 - cosine**2) ** 0.5
    planes = reference.draw_planes(rng, n * tables, bits, 8)
    a, b = reference.hashes(x, planes, bits=bits).reshape(2, n, tables)
    drawn = ((a == b).sum(-1) >= 2).mean()
    u = reference.probability(np.array(cosine), bits=bits, tables=tables)
    assert abs(drawn - u) < 4 * (u * (1 - u) / n) ** 0.5


def estimates(x, n, bits, tables, **options):
    """o and lse of the last token over n draws of the planes, [n, H, V] and [n, H]."""
    options = dict(prompt=0, sinks=0, window=1) | options
    q, K = x["q"][:1, -1:], x["q"].shape[3]
    found = [
        magicpig(
            q, k=x["k"][:1], v=x["v"][:1], planes=draw_planes(tables, bits, K, seed=seed), bits=bits,
            **options, return_lse=True, impl="torch",
        )
        for seed in range(n)
    ]  # fmt: skip
    return tuple(torch.stack([f[i][0, 0] for f in found]) for i in (0, 1))


@pytest.mark.parametrize("options", (dict(), dict(sinks=2, window=6, prompt=20)), ids=str)
def test_sums_are_unbiased(options, monkeypatch):
    """Numerator and denominator over 800 draws average to the truth, within 4 standard errors; unweighted
    sums do not.
    """
    x = inputs(B=1, H=2, K=8, V=3)

    def errors():
        """Of numerator and denominator, in standard errors, [H, V + 1]."""
        want, lse = softmax_attention(x["q"], x["k"], x["v"], return_lse=True, impl="torch")
        truth = torch.cat((want, torch.ones_like(lse)[..., None]), -1)[0, -1] * lse[0, -1, :, None].exp()
        o, lse = estimates(x, 800, 3, 8, **options)
        sums = torch.cat((o, torch.ones_like(lse)[..., None]), -1) * lse.exp()[..., None]
        return (sums.mean(0) - truth) / (sums.std(0) / 800**0.5)

    assert errors().abs().max() < 4
    module = sys.modules[magicpig.__module__]  # its function hides it
    monkeypatch.setattr(module, "probability", lambda cosine, **_: torch.ones_like(cosine))
    assert (errors()[:, -1] < -10).all()


def test_bias_of_the_quotient_shrinks():
    """With values that are the scores themselves, the mean over 32 heads and 300 draws: at 6 tables the
    quotient is biased, at 48 less than a quarter as much; the error of one draw falls as well.
    """
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 60, 32, 8, generator=g, dtype=torch.float64) for _ in range(2))
    x = dict(q=q, k=k, v=torch.einsum("hk,bjhk->bjh", q[0, -1], k)[..., None] * 8**-0.5)
    want = softmax_attention(**x, impl="torch")[0, -1]
    bias, noise, error = {}, {}, {}
    for tables, n in ((6, 300), (48, 100)):
        off = estimates(x, n, 3, tables)[0] - want
        each = off.mean((1, 2))
        bias[tables], noise[tables] = float(each.mean()), float(each.std()) / n**0.5
        error[tables] = float(off.square().mean().sqrt())
    assert bias[6] > 4 * noise[6], (bias, noise)
    assert abs(bias[48]) + 2 * noise[48] < bias[6] / 4 and error[48] < error[6] / 4, (bias, noise, error)


def test_the_mean_key_does_not_matter():
    """All keys moved alike: with the prompt's mean taken away the same are drawn, without it others."""
    x = inputs(H=4, HKV=2)
    moved = x | {"k": x["k"] + 3 * torch.randn(16, dtype=torch.float64)}
    options = dict(bits=2, sinks=2, window=4, impl="torch")
    for prompt, same in ((20, True), (0, False)):
        a, b = (magicpig(**y, **options, prompt=prompt)[:, 20:] for y in (x, moved))
        assert (relative_error(a, b) < 1e-9) == same


def test_equal_keys_are_drawn_alike():
    """Keys that are their own mean lie in bucket 0 of every table: all are drawn, or none, of chance u(0)."""
    x = inputs(B=1)
    x["k"] = x["k"][:, :1].expand(-1, 48, -1, -1).contiguous()
    _, lse = magicpig(**x, bits=2, prompt=20, sinks=0, window=1, return_lse=True, impl="torch")
    exact = softmax_attention(x["q"], x["k"], x["v"], return_lse=True, impl="torch")[1]
    t, u = torch.arange(1, 49)[:, None], float(probability(torch.tensor(0.0), bits=2, tables=6))
    weight = (lse - exact).exp()[0] * t  # of t tokens: 1, or 1 + (t - 1) / u
    none, all_ = (weight - 1).abs() < 1e-6, (weight - 1 - (t - 1) / u).abs() < 1e-4 * t
    assert (none | all_)[20:].all() and none[20:].any() and all_[20:].any()


@pytest.mark.parametrize("impl", ("torch", "auto"))
@pytest.mark.parametrize("prompt", (0, 20))
def test_decoding_with_a_cache(prompt, impl, device):
    x = {name: t.float().to(device) for name, t in inputs(T=40, H=6, HKV=2).items()}
    q, k, v, planes = x.values()
    options = dict(bits=2, prompt=prompt, sinks=2, window=5, impl=impl, return_lse=True)
    whole = magicpig(**x, **options | dict(impl="torch"))
    cache = KVCache(k[:, :10], v[:, :10])
    for _ in range(2):
        for t in range(10, 40):
            cache.append(k[:, t], v[:, t])
            if t % 5 == 2 or t > 37:
                o, lse = magicpig(q[:, t], cache, planes=planes, **options)
                assert o.shape == (2, 6, 24) and lse.shape == (2, 6)
                assert relative_error((o, lse), (whole[0][:, t], whole[1][:, t])) < 1e-5
        cache.truncate(10)
    last = magicpig(q[:, -3:], k=k, v=v, planes=planes, **options)
    assert relative_error(last, tuple(part[:, -3:] for part in whole)) < 1e-5


def test_tables_are_made_anew():
    """By other planes, and by another prompt's mean, for tokens that stay as they were too."""
    x = inputs(H=4, HKV=2)
    q, k, v = x["q"][:, -1], x["k"], x["v"]
    cache, options = KVCache(-k, v), dict(bits=2, prompt=20, sinks=2, window=5)
    for planes in (x["planes"], -2 * x["planes"].flip(0) + 1, x["planes"]):
        got = magicpig(q, cache, planes=planes, **options)
        want = magicpig(x["q"][:, -1:], k=-k, v=v, planes=planes, **options)[:, 0]
        assert relative_error(got, want) < RTOL
    cache.rewrite(k[:, 10:], v[:, 10:])
    got = magicpig(q, cache, planes=x["planes"], **options)
    mixed = torch.cat((-k[:, :10], k[:, 10:]), dim=1)
    want = magicpig(x["q"][:, -1:], k=mixed, v=v, planes=x["planes"], **options)[:, 0]
    assert relative_error(got, want) < RTOL


def test_queries_in_tiles(monkeypatch):
    x, options = inputs(H=4, HKV=2), dict(bits=2, prompt=20, sinks=2, window=5, return_lse=True)
    whole = magicpig(**x, **options | dict(impl="torch"))
    monkeypatch.setattr(decode, "GATHERED", 50000)
    assert relative_error(magicpig(**x, **options), whole) < RTOL


def test_a_bias_is_added_to_scores():
    """A token listed with a bias of log n weighs as n such tokens; the kernels refuse one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, t, h, 8, generator=g) for t, h in ((1, 6), (5, 2), (5, 2)))
    tokens, n = torch.tensor([4, 0, 2, -1]).int(), torch.tensor([1.0, 3, 2, 7])
    sets = tokens.expand(1, 1, 6, 4), n.log().expand(1, 1, 6, 4)
    got = decode.attend(q, k, v, sets[0], bias=sets[1], impl="torch")
    order = torch.tensor([0, 0, 0, 2, 2, 4])
    want = softmax_attention(q, k[:, order], v[:, order], causal=False, return_lse=True, impl="torch")
    assert relative_error(got, want) < 1e-6
    with pytest.raises(NotImplementedError, match="no bias"):
        decode.attend(q, k, v, sets[0], bias=sets[1], impl="triton")


def test_an_empty_cache():
    x = inputs(T=1)
    cache = KVCache(x["k"][:, :0], x["v"][:, :0])
    options = dict(planes=x["planes"], bits=2, prompt=0, return_lse=True)
    o, lse = magicpig(x["q"][:, 0], cache, **options)
    assert (o == 0).all() and lse.isneginf().all()


def test_errors():
    x = inputs()
    good = dict(bits=2, prompt=4)
    for name, n in (("prompt", 0), ("sinks", 0), ("window", 1)):
        with pytest.raises(ValueError, match=f"{name} is {n - 1}, expected >= {n}"):
            magicpig(**x, **good | {name: n - 1})
    for bits in (0, 31):
        with pytest.raises(ValueError, match=f"bits is {bits}, expected 1 to 30"):
            magicpig(**x, prompt=4, bits=bits)
    for bits in (5, 12):
        with pytest.raises(ValueError, match=f"planes has 12 rows, expected L bits = L {bits} with L >= 2"):
            magicpig(**x, prompt=4, bits=bits)
    for planes, error, match in (
        (x["planes"][:, :8], ValueError, r"planes has shape \(12, 8\), expected \[M, K\] = \(12, 16\)"),
        (x["planes"].long(), TypeError, "planes is torch.int64, expected a floating dtype"),
        (x["planes"].to("meta"), ValueError, "planes is on meta, expected cpu"),
    ):
        with pytest.raises(error, match=match):
            magicpig(**x | dict(planes=planes), **good)
    with pytest.raises(ValueError, match="neither a cache nor both k and v"):
        magicpig(x["q"], k=x["k"], planes=x["planes"], **good)
    with pytest.raises(NotImplementedError, match="no kernel"):
        magicpig(**x, **good, impl="triton")
