"""The blocks that layers share, each alone."""

import pytest
import torch

from effattn_lite.layers.common import ShortConvolution, first_steps


def convolution(*, bias=False):
    torch.manual_seed(0)
    conv = ShortConvolution(3, 4, bias=bias).double()
    if bias:
        torch.nn.init.normal_(conv.bias)
    return conv, torch.randn(2, 9, 3, dtype=torch.float64)


@pytest.mark.parametrize("bias", (False, True))
def test_short_convolution_is_conv1d_and_silu(bias):
    conv, x = convolution(bias=bias)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, conv.weight[:, None], conv.bias, groups=3)
    y, tail = conv.prefill(x)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected).transpose(1, 2))
    torch.testing.assert_close(tail, x[:, -3:])


def test_short_convolution_goes_on_from_its_tail():
    conv, x = convolution()
    whole, tail = conv.prefill(x)
    first, middle = conv.prefill(x[:, :2])
    second, end = conv.prefill(x[:, 2:5], middle)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole[:, :5])
    for t in range(5, 9):
        y, end = conv.step(x[:, t], end)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(end, tail)


def test_short_convolution_keeps_packed_sequences_apart():
    conv, x = convolution()
    cu_seqlens = torch.tensor([0, 2, 2, 3, 9])
    y, tail = conv.prefill(x[:1], cu_seqlens=cu_seqlens)
    for n, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        alone, its_tail = conv.prefill(x[:1, start:end])
        torch.testing.assert_close(y[:, start:end], alone)
        torch.testing.assert_close(tail[n], its_tail[0])


def test_first_steps_are_spread_over_two_decades():
    steps = torch.nn.functional.softplus(first_steps(3000))
    assert 0.00099 < steps.min() and steps.max() < 0.101
    assert abs((steps < 0.01).float().mean() - 0.5) < 0.05
