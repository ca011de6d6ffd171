"""What is special to SeerAttention: its gate by hand, its limits, its truth, and that the loss teaches it."""

import sys

import numpy as np
import pytest
import torch

from effattn_lite.layers.seer_attention import SeerAttention
from effattn_lite.ops import block_sparse_attention, seer_attention, softmax_attention
from effattn_lite.ops.seer_attention import gate, gate_loss, ground_truth, select
from effattn_lite.reference import seer_attention as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
WEIGHTS = ("w_q", "w_max", "w_min", "w_avg")


def draw(**sizes):
    """NumPy q, k, v and the gate's weights, small enough that no share is 1."""
    x = make_inputs("seer_attention", **sizes)
    return {n: t / 8 if n in WEIGHTS else t for n, t in x.items()}


def parts(x):
    """(q, k), v and the weights apart."""
    return (x["q"], x["k"]), x["v"], {n: x[n] for n in WEIGHTS}


@pytest.mark.parametrize("options", (dict(top_k=3), dict(top_k=99), dict(threshold=-1.0)), ids=str)
def test_reduces_to_softmax_attention(options):
    x = to_torch(draw(H=4, HKV=2))
    got = seer_attention(**x, block_size=16, **options, return_lse=True, impl="torch")
    want = softmax_attention(x["q"], x["k"], x["v"], return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("options", (dict(top_k=1), dict(threshold=1.0)), ids=str)
def test_own_block_alone(options):
    x = to_torch(draw(T=40))
    got = seer_attention(**x, block_size=8, **options, impl="torch")
    qkv = [x[n] for n in "qkv"]
    pieces = [softmax_attention(*(t[:, i : i + 8] for t in qkv), impl="torch") for i in range(0, 40, 8)]
    assert relative_error(got, torch.cat(pieces, dim=1)) < RTOL


def test_gate_by_hand():
    """One channel, blocks of 2, all weights 1: queries pool to 1, keys to max + min + mean."""
    one = np.ones((1, 1, 1))
    q, k = np.array([0.0, 2, 2, 0, 1]).reshape(1, 5, 1, 1), np.array([3.0, 1, -2, 0, 5]).reshape(1, 5, 1, 1)
    weights = dict(w_q=one, w_max=one, w_min=one, w_avg=one)
    scores = np.array([3 + 1 + 2, 0 - 2 - 1, 5 + 5 + 5])
    p = reference.gate(q, k, block_size=2, **weights)[0, 0]
    for i in range(3):
        want = np.exp(scores[: i + 1]) / np.exp(scores[: i + 1]).sum()
        assert np.abs(p[i, : i + 1] - want).max() < 1e-15 and (p[i, i + 1 :] == 0).all()
    one = torch.ones(1, 1, 1)
    mask = select(torch.tensor(q), torch.tensor(k), **dict.fromkeys(WEIGHTS, one), block_size=2, top_k=2)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, False, True]]


@pytest.mark.parametrize("T", (1, 5, 63, 64))
@pytest.mark.parametrize("H, HKV", ((2, 2), (6, 2), (7, 1), (16, 1)))
def test_gate_truth_and_choice_equal_reference(T, H, HKV):
    x = draw(T=T, H=H, HKV=HKV)
    (q, k), _, weights = parts(to_torch(x))
    for theta in (None, 100.0):
        how = dict(block_size=8, rope_theta=theta)
        want = reference.gate(x["q"], x["k"], **{n: x[n] for n in WEIGHTS}, **how)
        assert relative_error(gate(q, k, **weights, **how), want) < RTOL
        for options in (dict(top_k=3), dict(threshold=0.2)):
            mask = select(q, k, **weights, **how, **options)
            chosen = reference.select(x["q"], x["k"], **{n: x[n] for n in WEIGHTS}, **how, **options)
            assert np.array_equal(mask.numpy(), chosen)
    want = reference.ground_truth(x["q"], x["k"], block_size=8)
    assert relative_error(ground_truth(q, k, block_size=8), want) < RTOL


def test_rows_in_tiles(monkeypatch):
    x = to_torch(draw(T=100))
    (q, k), _, weights = parts(x)
    want = select(q, k, **weights, block_size=4, top_k=5)
    monkeypatch.setattr(sys.modules["effattn_lite.ops.seer_attention"], "ROWS", 7)
    assert torch.equal(select(q, k, **weights, block_size=4, top_k=5), want)


def test_ties_go_to_the_lower_block():
    zeros, weights = torch.zeros(1, 40, 2, 8), {n: torch.zeros(2, 8, 4) for n in WEIGHTS}
    mask = select(zeros, zeros, **weights, block_size=8, top_k=3)
    assert (mask[0, :, 4] == torch.tensor([True, True, False, False, True])).all()


def test_the_truth_by_hand():
    """Equal keys: token t gives 1 / (t + 1) to each, a block keeps the largest; rows sum to 1."""
    zeros = torch.zeros(1, 4, 1, 2)
    truth = ground_truth(zeros, zeros, block_size=2)[0, 0]
    assert relative_error(truth, torch.tensor([[1.0, 0], [0.5, 0.5]])) < 1e-6


def test_loss_equals_its_definition():
    x = to_torch(draw(T=63, H=4, HKV=2))
    (q, k), _, weights = parts(x)
    truth, p = ground_truth(q, k, block_size=8), gate(q, k, **weights, block_size=8)
    rows = torch.xlogy(truth, truth / p.where(truth > 0, 1.0)).sum(-1)[:, :, 2:]  # 8 // 4 rows are left out
    loss = gate_loss(q, k, truth, **weights, block_size=8)
    assert relative_error(loss, rows.mean()) < RTOL and loss > 0
    assert gate_loss(q, k, p, **weights, block_size=8) < 1e-12


@pytest.mark.parametrize("T", (1, 13))
def test_gradient_of_the_gate(T):
    """Central differences of the loss and of the shares, with respect to the weights and to q and k."""
    x = to_torch(draw(B=1, T=T, H=2, HKV=1, K=3, V=2, M=4), requires_grad=True)
    (q, k), _, weights = parts(x)
    truth = ground_truth(q, k, block_size=3)

    def function(q, k, *weights):
        named = dict(zip(WEIGHTS, weights, strict=True)) | dict(block_size=3, rope_theta=10.0)
        return gate_loss(q, k, truth, **named), gate(q, k, **named)

    assert torch.autograd.gradcheck(function, (q, k, *weights.values()))


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_gradient_of_the_attention(impl, device):
    """It is that of block-sparse attention under the chosen mask; none reaches the gate."""
    x = {n: t.float().to(device).requires_grad_() for n, t in to_torch(draw(T=40, H=4, HKV=2)).items()}
    (q, k), v, weights = parts(x)
    o = seer_attention(**x, block_size=8, top_k=2, impl=impl)
    got = torch.autograd.grad(o.square().sum(), (q, k, v), retain_graph=True)
    mask = select(q, k, **weights, block_size=8, top_k=2)
    want = block_sparse_attention(q, k, v, block_mask=mask, block_size=8, impl="torch")
    want = torch.autograd.grad(want.square().sum(), (q, k, v))
    assert relative_error(got, want) < 1e-4
    left = torch.autograd.grad(o.sum(), tuple(weights.values()), allow_unused=True)
    assert left == (None,) * 4


def test_the_loss_teaches_the_gate():
    """A gate drawn at random, on texts whose far blocks answer each other, learns which hold the weight."""
    g, size = torch.Generator().manual_seed(0), dict(block_size=8)
    weights = {n: torch.randn(2, 16, 8, generator=g).div(16).requires_grad_() for n in WEIGHTS}

    def text():
        # each block of keys has a topic; each block of queries asks for that of one past block, or its own
        topics = torch.randn(24, 16, generator=g) * 2
        asked = topics[(torch.rand(24, generator=g) * torch.arange(1, 25)).long()]
        noise = torch.randn(2, 1, 192, 2, 16, generator=g)
        return [t.repeat_interleave(8, 0)[:, None] + n for t, n in zip((asked, topics), noise, strict=True)]

    @torch.no_grad()
    def measure(q, k):
        """The loss, and the share of the best three past blocks' weight that the chosen ones hold."""
        truth = ground_truth(q, k, **size)
        past = truth.tril(-1)
        held = past * select(q, k, **weights, **size, top_k=4)
        return gate_loss(q, k, truth, **weights, **size).item(), (held.sum() / past.topk(3)[0].sum()).item()

    unseen = text()
    before, poor = measure(*unseen)
    optimiser = torch.optim.Adam(weights.values(), lr=0.02)
    for _ in range(60):
        q, k = text()
        optimiser.zero_grad()
        gate_loss(q, k, ground_truth(q, k, **size), **weights, **size).backward()
        optimiser.step()
    after, good = measure(*unseen)
    assert after < before / 2 and good > 0.85 and good > poor + 0.25, (before, poor, after, good)


def test_a_block_that_was_not_chosen_is_not_seen():
    x = to_torch(draw(T=40, H=1))
    (q, k), v, weights = parts(x)
    mask = select(q, k, **weights, block_size=8, top_k=2)
    v = v.requires_grad_()
    seer_attention(q, k, v, **weights, block_size=8, top_k=2, impl="torch")[0, 32:].sum().backward()
    reached = v.grad[0].view(5, 8, -1).abs().sum((1, 2)) > 0
    assert torch.equal(reached, mask[0, 0, 4])


def test_layer():
    """Dense weights fit; the gate reads unrotated vectors; its loss reaches the gate alone."""
    layer = SeerAttention(32, 4, kv_heads=2, block_size=8, top_k=2, gate_dim=6).double()
    x = torch.randn(2, 45, 32, dtype=torch.float64)
    layer.gate_loss(x).backward()
    assert all((p.grad is None) == (not n.startswith("gate.")) for n, p in layer.named_parameters())
    y, cache = layer.prefill(x)
    assert cache["k"].shape == cache["v"].shape == (2, 45, 2, 8)
    edges = torch.tensor([0, 20, 20, 45])
    packed = layer(x[:1], cu_seqlens=edges)
    alone = torch.cat((layer(x[:1, :20]), layer(x[:1, 20:])), dim=1)
    assert relative_error(packed, alone) < RTOL
    with pytest.raises(NotImplementedError, match="whole prompts"):
        layer.step(x[:, 0], cache)


def test_errors():
    x = to_torch(draw(H=4, HKV=2))
    (q, k), _, weights = parts(x)
    for options, match in (
        ({}, "exactly one of top_k and threshold, got neither"),
        (dict(top_k=2, threshold=0.1), "got both"),
        (dict(top_k=0), "top_k is 0, expected >= 1"),
        (dict(top_k=2, block_size=0), "block_size is 0, expected >= 1"),
    ):
        with pytest.raises(ValueError, match=match):
            seer_attention(**x, **options)
    with pytest.raises(
        ValueError, match=r"w_max has shape \(4, 16, 12\), expected \[HKV, K, M\] = \(2, 16, 12\)"
    ):
        seer_attention(**x | dict(w_max=x["w_q"]), top_k=2)
    with pytest.raises(ValueError, match="M = 11 channels, expected an even number"):
        select(q, k, **{n: w[..., :11] for n, w in weights.items()}, rope_theta=10.0, top_k=2)
    with pytest.raises(ValueError, match=r"truth has shape.*\(2, 4, 3, 3\) as the gate"):
        gate_loss(q, k, ground_truth(q, k, block_size=8), **weights, block_size=16)
    assert max_error(gate(q, k, **weights, block_size=16).sum(-1), torch.ones(2, 4, 3)) < 1e-12
