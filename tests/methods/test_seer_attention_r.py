"""What is special to SeerAttention-R: its gate by hand, its limits, decoding with a cache, its loss."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.seer_attention_r import SeerAttentionR
from effattn_lite.ops import KVCache, block_sparse_attention, seer_attention_r, softmax_attention
from effattn_lite.ops.seer_attention_r import compress, gate, gate_loss, ground_truth, select
from effattn_lite.reference import seer_attention_r as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10
WEIGHTS = ("w_q", "w_max", "w_min", "w_avg")


def draw(**sizes):
    """NumPy q, k, v and the gate's weights, small enough that no share is 1."""
    x = make_inputs("seer_attention_r", **sizes)
    return {n: t / 8 if n in WEIGHTS else t for n, t in x.items()}


def parts(x):
    """(q, k), v and the weights apart."""
    return (x["q"], x["k"]), x["v"], {n: x[n] for n in WEIGHTS}


@pytest.mark.parametrize("options", (dict(budget=48), dict(budget=999), dict(threshold=-1.0)), ids=str)
def test_reduces_to_softmax_attention(options):
    x = to_torch(draw(H=4, HKV=2))
    got = seer_attention_r(**x, block_size=7, **options, return_lse=True, impl="torch")
    want = softmax_attention(x["q"], x["k"], x["v"], return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("options", (dict(budget=1), dict(threshold=1.0)), ids=str)
def test_newest_block_alone(options):
    x = to_torch(draw(T=40))
    got = seer_attention_r(**x, block_size=8, **options, impl="torch")
    qkv = [x[n] for n in "qkv"]
    pieces = [softmax_attention(*(t[:, i : i + 8] for t in qkv), impl="torch") for i in range(0, 40, 8)]
    assert relative_error(got, torch.cat(pieces, dim=1)) < RTOL


def test_gate_by_hand():
    """One channel, blocks of 2: two heads add up to one query, keys pool to max + min + mean."""
    q = np.array([[1.0, 2]] * 6).reshape(1, 6, 2, 1)
    k = np.array([3.0, 1, -2, 0, 1, 9]).reshape(1, 6, 1, 1)
    weights = dict(w_q=np.array([2.0, -0.5]).reshape(2, 1, 1)) | dict.fromkeys(
        WEIGHTS[1:], np.ones((1, 1, 1))
    )
    kg = reference.compress(k, **{n: weights[n] for n in WEIGHTS[1:]}, block_size=2)
    assert kg.ravel().tolist() == [6, -3, 15] and reference.project(q, weights["w_q"], 1).ravel()[0] == 1
    x = {n: torch.tensor(t) for n, t in (weights | dict(q=q, k=k)).items()}
    p = gate(**x, block_size=2)[0, 0]
    assert p.shape == (6, 3) and (p[:2] == 0).all() and p[2:4].tolist() == [[1, 0, 0]] * 2
    assert max_error(p[4], torch.tensor([np.exp(9), 1, 0]) / (np.exp(9) + 1)) < 1e-15
    chosen = select(**x, block_size=2, budget=4, impl="torch")[0, :, 0]
    assert chosen.tolist() == [[0, -1], [0, -1], [1, 0], [1, 0], [2, 0], [2, 0]]


@pytest.mark.parametrize("T", (1, 5, 63, 64))
@pytest.mark.parametrize("H, HKV", ((2, 2), (6, 2), (7, 1), (16, 1)))
def test_gate_truth_and_choice_equal_reference(T, H, HKV):
    x = draw(T=T, H=H, HKV=HKV)
    (q, k), _, weights = parts(to_torch(x))
    given = {n: x[n] for n in WEIGHTS}
    for theta in (None, 100.0):
        how = dict(block_size=8, rope_theta=theta)
        for options in (dict(budget=20), dict(threshold=0.2)):
            chosen = select(q, k, **weights, **how, **options, impl="torch")
            want = reference.select(x["q"], x["k"], **given, **how, **options)
            assert chosen.dtype == torch.int32 and np.array_equal(chosen.numpy(), want)
            o = seer_attention_r(**to_torch(x), **how, **options, impl="torch", return_lse=True)
            for form in (reference.quadratic, reference.decoded):
                assert relative_error(o, form(**x, **how, **options)) < RTOL
    assert (
        relative_error(ground_truth(q, k, block_size=8), reference.ground_truth(x["q"], x["k"], block_size=8))
        < RTOL
    )


def test_selection_counts_blocks_from_each_start():
    x = to_torch(draw(B=1, T=48))
    (q, k), _, weights = parts(x)
    edges = [0, 0, 20, 21, 48]
    for options in (dict(budget=15), dict(threshold=0.2)):
        how = weights | options | dict(block_size=5, rope_theta=10.0, impl="torch")
        packed = select(q, k, **how, cu_seqlens=torch.tensor(edges))
        for a, b in zip(edges, edges[1:], strict=False):
            alone = select(q[:, a:b], k[:, a:b], **how)
            n = alone.shape[-1]
            assert torch.equal(packed[:, a:b, :, :n], alone) and (packed[:, a:b, :, n:] == -1).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_ties_go_to_the_lower_block(impl, device):
    zeros = torch.zeros(1, 40, 2, 8, device=device)
    weights = {n: torch.ones(2, 8, 4, device=device) for n in WEIGHTS}
    chosen = select(zeros, zeros, **weights, block_size=8, budget=24, impl=impl)
    assert (chosen[0, 35:].cpu() == torch.tensor([4, 0, 1])).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("first", (0, 22))
@pytest.mark.parametrize("options", (dict(budget=12), dict(threshold=0.2)), ids=str)
def test_decoding_with_a_cache(first, options, impl, device):
    """Token by token over a cache, which compresses a block once, equals the text; and so with k_cmp."""
    x = {n: t.float().to(device) for n, t in to_torch(draw(T=23, H=6, HKV=2)).items()}
    (q, k), v, weights = parts(x)
    how = weights | options | dict(block_size=4, rope_theta=50.0, impl=impl, return_lse=True)
    whole = seer_attention_r(q, k=k, v=v, **how)
    summed = {n: w for n, w in weights.items() if n != "w_q"} | dict(block_size=4, rope_theta=50.0)
    cache = KVCache(k[:, :first], v[:, :first])
    for t in range(first, 23):
        cache.append(k[:, t], v[:, t])
        if t % 5 == 2 or t > 20:
            got = seer_attention_r(q[:, t], cache, **how)
            assert relative_error(got, tuple(part[:, t] for part in whole)) < 1e-5
            given = seer_attention_r(q[:, t], cache, **how, k_cmp=compress(k[:, : t + 1], **summed))
            assert relative_error(given, got) < 1e-5


def test_the_gate_reads_its_own_vectors():
    """With queries and keys of its own, the choice is theirs and the attention is not."""
    x, other = to_torch(draw()), to_torch(make_inputs("seer_attention_r", seed=1))
    (q, k), v, weights = parts(x)
    how = dict(block_size=8, budget=16)
    got = seer_attention_r(**x, **how, q_gate=other["q"], k_gate=other["k"], impl="torch")
    pages = select(other["q"], other["k"], **weights, **how, impl="torch")
    want = block_sparse_attention(
        q, k, v, block_indices=pages, block_size=8, query_block_size=1, impl="torch"
    )
    assert (
        relative_error(got, want) < RTOL
        and relative_error(seer_attention_r(**x, **how, impl="torch"), want) > 0.1
    )


def test_an_empty_cache():
    x = to_torch(draw(T=1))
    (q, k), v, weights = parts(x)
    cache = KVCache(k[:, :0], v[:, :0])
    o, lse = seer_attention_r(q[:, 0], cache, **weights, budget=16, return_lse=True, impl="torch")
    assert (o == 0).all() and lse.isneginf().all()


def test_truth_by_hand():
    """Equal keys, blocks of 2: token t gives 1 / (t + 1) to each; whole past blocks share it evenly."""
    zeros = torch.zeros(1, 5, 2, 2)
    truth = ground_truth(zeros, zeros[:, :, :1], block_size=2)[0, 0]
    assert max_error(truth, torch.tensor([[0.0, 0]] * 2 + [[1.0, 0]] * 2 + [[0.5, 0.5]])) < 1e-7


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
    """It is that of block-sparse attention to the chosen blocks; none reaches the gate."""
    x = {n: t.float().to(device).requires_grad_() for n, t in to_torch(draw(T=40, H=4, HKV=2)).items()}
    (q, k), v, weights = parts(x)
    o = seer_attention_r(**x, block_size=8, budget=16, impl=impl)
    got = torch.autograd.grad(o.square().sum(), (q, k, v), retain_graph=True)
    pages = select(q, k, **weights, block_size=8, budget=16, impl="torch")
    want = block_sparse_attention(
        q, k, v, block_indices=pages, block_size=8, query_block_size=1, impl="torch"
    )
    want = torch.autograd.grad(want.square().sum(), (q, k, v))
    assert relative_error(got, want) < 1e-4
    assert torch.autograd.grad(o.sum(), tuple(weights.values()), allow_unused=True) == (None,) * 4


def test_the_loss_teaches_the_gate():
    """A gate drawn at random learns where the weight lies, in a layer whose other weights stay."""
    torch.manual_seed(0)
    layer = SeerAttentionR(32, 4, kv_heads=2, block_size=8, budget=32, gate_dim=16, rope_theta=None)
    for proj in (layer.q_proj, layer.k_proj):  # a token answers those that are like it
        proj.weight.data = torch.randn(8, 32).repeat(proj.weight.shape[0] // 8, 1) * 0.3
    kept = layer.q_proj.weight.clone()

    def text():
        # each block has a topic, one of six
        topics = torch.randn(6, 32)[torch.randint(0, 6, (24,))]
        return topics.repeat_interleave(8, 0) + 0.3 * torch.randn(1, 192, 32)

    @torch.no_grad()
    def measure(x):
        """The loss, and the share of the best three blocks' weight that the chosen three hold."""
        q, k, _ = layer.project(x)
        truth = ground_truth(q, k, block_size=8)
        past = select(q, k, **layer.gate, **layer.where, budget=32, impl="torch")[..., 1:].transpose(1, 2)
        held = truth.gather(-1, past.clamp(min=0).long()) * (past >= 0)
        best = truth.topk(3)[0]
        return layer.gate_loss(x).item(), (held[:, :, 32:].sum() / best[:, :, 32:].sum()).item()

    unseen = text()
    before, poor = measure(unseen)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        layer.gate_loss(text()).backward()
        optimiser.step()
    after, good = measure(unseen)
    assert torch.equal(layer.q_proj.weight, kept)
    assert after < before / 2 and good > 0.85 and good > poor + 0.25, (before, poor, after, good)


@pytest.mark.parametrize("options", (dict(budget=12), dict(threshold=0.1)), ids=str)
def test_layer_in_odd_pieces(options):
    layer = SeerAttentionR(16, 4, block_size=4, kv_heads=2, **options).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
    assert cache["k_cmp"].shape == (2, 10, 2, 4) and cache["k_rest"].shape == (2, 1, 2, 4)
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


def test_errors():
    x = to_torch(draw(H=4, HKV=2))
    (q, k), v, weights = parts(x)
    cache, one = KVCache(k, v), dict(budget=16) | weights
    for options, match in (
        ({}, "exactly one of budget and threshold, got neither"),
        (dict(budget=2, threshold=0.1), "got both"),
        (dict(budget=0), "budget is 0, expected >= 1"),
        (dict(budget=2, block_size=0), "block_size is 0, expected >= 1"),
        (dict(budget=2, k_gate=k[:, :9]), r"k_gate has shape \(2, 9, 2, 16\).*\(2, 48, 2, 16\)"),
        (dict(budget=2, k_gate=k, k_cmp=k), "no k_gate or cu_seqlens beside it"),
        (dict(budget=2, block_size=16, k_cmp=k), r"k_cmp has shape.*\(2, 3, 2, 12\)"),
    ):
        with pytest.raises(ValueError, match=match):
            seer_attention_r(**x, **options)
    with pytest.raises(ValueError, match="neither a cache nor both k and v"):
        seer_attention_r(q, k=k, **one)
    with pytest.raises(ValueError, match="expected none beside it"):
        seer_attention_r(q[:, 0], cache, k_gate=k, **one)
    with pytest.raises(ValueError, match=r"q has shape \(2, 48, 4, 16\), expected 3 axes"):
        seer_attention_r(q, cache, **one)
    with pytest.raises(TypeError, match="q is torch.float32, expected torch.float64 as the cache"):
        seer_attention_r(q[:, 0].float(), cache, **one)
    with pytest.raises(
        ValueError, match=r"w_q has shape \(2, 16, 12\), expected \[H, K, M\] = \(4, 16, 12\)"
    ):
        seer_attention_r(q[:, 0], cache, **one | dict(w_q=x["w_max"]))
    with pytest.raises(ValueError, match=r"truth has shape.*\(2, 2, 48, 6\)"):
        gate_loss(q, k, ground_truth(q, k, block_size=16), **weights, block_size=8)
