"""What is special to DoubleSparsity: calibration and selection, its limits, its label cache."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import KVCache, double_sparsity, softmax_attention
from effattn_lite.ops.double_sparsity import calibrate, select
from effattn_lite.reference import double_sparsity as reference
from effattn_lite.testing import make_inputs, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("double_sparsity", **sizes))


@pytest.mark.parametrize("channels", ((0,), tuple(range(16))), ids=("one channel", "all channels"))
@pytest.mark.parametrize("budget", (48, 100))
def test_reduces_to_softmax_attention(channels, budget):
    x = inputs(H=4, HKV=2)
    got = double_sparsity(**x, channels=channels, budget=budget, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


@pytest.mark.parametrize("n", (1, 7))
def test_all_channels_choose_the_heaviest_tokens(n):
    """With every channel the labels are the keys, and the choice is the oracle's: the largest products."""
    x = inputs(H=4, HKV=2)
    got = select(x["q"], x["k"], channels=range(16), budget=n, impl="torch")[:, -1]
    products = torch.einsum("bhk,bjhk->bhj", x["q"][:, -1], x["k"].repeat_interleave(2, 2))
    assert torch.equal(got.long(), products.topk(n)[1])


def test_calibration_by_hand():
    """Channel 1 carries the products of head 0 in both directions, channel 2 those of head 1."""
    q = torch.tensor([[[1.0, 3, 0], [1, 0, 1]], [[1, -3, 0], [1, 0, 1]]])[None]
    k = torch.tensor([[[1.0, 1, 9], [1, 0, 5]], [[1, 1, 9], [-1, 0, 5]]])[None]
    assert calibrate(q, k, r=2).tolist() == [[1, 0], [2, 0]]
    # one key head for both: 0 + 0 + 2 + 2, 6 + 0, 0 + 18
    assert calibrate(q, k[:, :, :1], r=3).tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("sizes", (dict(), dict(H=6, HKV=2)), ids=str)
def test_calibration_and_selection_equal_reference(sizes):
    x = make_inputs("double_sparsity", **sizes)
    channels = reference.calibrate(x["q"], x["k"], r=4)
    y = to_torch(x)
    assert np.array_equal(calibrate(y["q"], y["k"], r=4).numpy(), channels)
    want = reference.select(x["q"], x["k"], channels=channels, budget=6)
    got = select(y["q"], y["k"], channels=torch.tensor(channels), budget=6, impl="torch")
    assert got.dtype == torch.int32 and np.array_equal(got.numpy(), want)
    o = double_sparsity(**y, channels=torch.tensor(channels), budget=6, return_lse=True, impl="torch")
    assert relative_error(o, reference.quadratic(**x, channels=channels, budget=6)) < RTOL


@pytest.mark.parametrize("seed", range(5))
def test_outlier_channels_find_the_weight(seed):
    """4 of 32 channels are 6 times as strong, as in real keys: their labels find 64 of 512 tokens that hold
    most of what the 64 heaviest hold. 4 other channels do not.
    """
    g = torch.Generator().manual_seed(seed)
    strength = torch.ones(32, dtype=torch.float64)
    strong, weak = torch.randperm(32, generator=g).split((4, 28))
    strength[strong] = 6.0
    q, k = (torch.randn(1, 512, 1, 32, generator=g, dtype=torch.float64) for _ in range(2))
    k = k * strength
    channels = calibrate(q, k, r=4)
    assert set(channels[0].tolist()) == set(strong.tolist())
    p = torch.softmax((k[0, :, 0] @ q[0, -1, 0]) * 32**-0.5, 0)
    best = p.topk(64)[0].sum()
    found, blind = (
        p[select(q[:, -1:], k, channels=c, budget=64, impl="torch")[0, 0, 0].long()].sum()
        for c in (channels, weak[:4])
    )
    assert found > 0.8 * best and blind < 0.5 * best, (found, blind, best)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("channels", ((1, 4, 6), "calibrated"), ids=str)
def test_decoding_with_a_cache(channels, impl, device):
    x = {name: t.float().to(device) for name, t in inputs(T=23, H=4, HKV=2).items()}
    q, k, v = x.values()
    channels = calibrate(q, k, r=3) if channels == "calibrated" else channels
    options = dict(channels=channels, budget=9, impl=impl, return_lse=True)
    whole = double_sparsity(**x, **options)
    cache = KVCache(k[:, :5], v[:, :5])
    for t in range(5, 23):
        cache.append(k[:, t], v[:, t])
        if t % 5 == 2 or t > 20:
            got = double_sparsity(q[:, t], cache, **options)
            assert relative_error(got, tuple(part[:, t] for part in whole)) < 1e-5


def test_other_channels_make_other_labels():
    x = inputs()
    cache, q = KVCache(x["k"], x["v"]), x["q"][:, -1]
    for channels in (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 1])):
        got = double_sparsity(q, cache, channels=channels, budget=5, impl="torch")
        want = double_sparsity(**x, channels=channels, budget=5, impl="torch")[:, -1]
        assert relative_error(got, want) < RTOL


def test_errors():
    x = inputs(H=4, HKV=2)
    for channels, error, match in (
        (torch.zeros(3, 2, dtype=torch.long), ValueError, r"channels has shape \(3, 2\).*HKV = 2"),
        ((), TypeError, "channels is torch.float32"),
        (torch.zeros(0, dtype=torch.long), ValueError, r"shape \(0,\).*r >= 1"),
        (torch.zeros(2, 2), TypeError, "channels is torch.float32, expected integers"),
        ((0, 16), ValueError, "expected 0 to K - 1 = 15"),
        ((-1, 3), ValueError, "expected 0 to K - 1 = 15"),
    ):
        with pytest.raises(error, match=match):
            double_sparsity(**x, channels=channels, budget=4)
    with pytest.raises(ValueError, match="budget is 0, expected >= 1"):
        double_sparsity(**x, channels=(1,), budget=0)
    with pytest.raises(ValueError, match="neither a cache nor both k and v"):
        double_sparsity(x["q"], channels=(1,), budget=4)
    for r in (0, 17):
        with pytest.raises(ValueError, match=f"r is {r}, expected 1 to K = 16"):
            calibrate(x["q"], x["k"], r=r)
