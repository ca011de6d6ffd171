"""What is special to RWKV-5: a decay a channel, a bonus for the token itself, the token shift."""

import pytest
import torch

from effattn_lite.layers.rwkv5 import RWKV5
from effattn_lite.ops.lightning_attention import lightning_attention
from effattn_lite.ops.rwkv5 import rwkv5
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch


def draw(**sizes):
    return to_torch(make_inputs("rwkv5", state=True, **sizes))


def test_reduces_to_lightning_attention():
    """g equal in a head's channels, q scaled by e^g and u = e^-g: the state is read after the write."""
    x = draw(T=37)
    g = torch.tensor([-0.3, -0.05], dtype=torch.float64)
    x["g"] = g[:, None].expand_as(x["g"])
    x["u"] = (-x["g"]).exp()
    got = rwkv5(**x | {"q": x["q"] * g.exp()[:, None]}, output_final_state=True)
    del x["u"]
    assert relative_error(got, lightning_attention(**x | {"g": g}, output_final_state=True)) < 1e-12


def test_bonus_touches_the_own_token_alone():
    x = draw(T=20)
    base, more = rwkv5(**x, output_final_state=True), rwkv5(**x | {"u": x["u"] + 1}, output_final_state=True)
    own = (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    assert relative_error(more[0] - base[0], own) < 1e-10
    assert torch.equal(more[1], base[1])


def test_without_bonus_the_token_is_not_seen():
    """u = 0 and no state: the first output is 0."""
    x = draw(T=5)
    o = rwkv5(x["q"], x["k"], x["v"], g=x["g"], u=torch.zeros_like(x["u"]))[0]
    assert max_error(o[:, 0], torch.zeros_like(o[:, 0])) == 0 and o[:, 1].abs().max() > 0


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_channels_of_very_different_decay(impl, device):
    """0, -1e-6, -1 and -20 nats a token side by side: an in-chunk reference point would overflow."""
    inputs = make_inputs("rwkv5", B=1, T=70, H=1, K=16, V=16, state=True, dtype="float32")
    inputs["g"][:] = [0.0, -1e-6, -1.0, -20.0] * 4
    want = rwkv5(**to_torch(inputs), output_final_state=True)
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    got = rwkv5(**x, output_final_state=True, impl=impl)
    assert relative_error(tuple(t.detach() for t in got), want) < 1e-5
    (got[0].sum() + got[1].sum()).backward()
    assert all(t.grad.isfinite().all() for t in x.values())


def test_layer_decay_is_a_decay():
    """w = exp(-exp(omega)) lies in (0, 1) whatever is learned, and begins between e^-e^-6 and e^-e^-1."""
    w = (-RWKV5(64, 2, layer=1, layers=4).omega.exp()).exp()
    assert w.min() > 0.69 and w.max() < 0.9976


def test_token_shift_stops_at_a_sequence():
    """Changing the last token of one packed sequence leaves the next sequence as it was."""
    layer, x = RWKV5(32, 2).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    edges, other = torch.tensor([0, 9, 9, 20]), x.clone()
    other[:, 8] += 1
    assert torch.equal(layer(x, cu_seqlens=edges)[:, 9:], layer(other, cu_seqlens=edges)[:, 9:])


def test_packed_prefill_can_be_continued():
    layer, x = RWKV5(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
