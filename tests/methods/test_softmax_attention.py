"""What is special to softmax attention: limits, sinks, caps, empty rows, alignment, one node to a tracer."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.softmax_attention import SoftmaxAttention
from effattn_lite.ops import softmax_attention
from effattn_lite.reference import softmax_attention as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

RTOL = 1e-10
SMALL = dict(B=1, T=6, H=2, HKV=1, K=4, V=3)
PATTERNS = [
    dict(),
    dict(causal=False),
    dict(window=3, sinks=1),
    dict(causal=False, window=2, sinks=4),
    dict(softcap=1.5, scale=-0.7),
]


def inputs(*, dtype="float64", **sizes):
    return to_torch(make_inputs("softmax_attention", dtype=dtype, **sizes), dtype=dtype)


def attend(x, **options):
    return softmax_attention(**x, return_lse=True, impl="torch", **options)


@pytest.mark.parametrize("options", PATTERNS, ids=str)
@pytest.mark.parametrize("learned", (False, True))
def test_gradient_through_lse(options, learned):
    x = [t.requires_grad_() for t in inputs(**SMALL).values()]
    x += [torch.randn(2, dtype=torch.float64, requires_grad=True)] if learned else []

    def function(q, k, v, sink_logits=None):
        return softmax_attention(q, k, v, sink_logits=sink_logits, return_lse=True, impl="torch", **options)

    assert torch.autograd.gradcheck(function, x)


def test_gradient_of_lse_alone():
    x = [t.requires_grad_() for t in inputs(**SMALL).values()]
    attend(dict(zip("qkv", x, strict=True)))[1].sum().backward()
    assert max_error(x[2].grad, np.zeros(x[2].shape)) == 0 and x[0].grad.abs().max() > 0


@pytest.mark.parametrize("options", (dict(), dict(causal=False), dict(window=5, sinks=2)), ids=str)
def test_reference_backward(options):
    x = make_inputs("softmax_attention", T=20, H=4, HKV=2)
    o, lse = run_reference("softmax_attention", x, **options)
    rng = np.random.default_rng(1)
    do, dlse = rng.normal(size=o.shape), rng.normal(size=lse.shape)
    want = reference.backward(*x.values(), o, lse, do, dlse, **options)
    t = to_torch(x, requires_grad=True)
    got = torch.autograd.grad(attend(t, **options), tuple(t.values()), (torch.tensor(do), torch.tensor(dlse)))
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("window, sinks", ((5, 0), (5, 20), (1, 3)))
def test_window_on_both_sides(window, sinks):
    x, options = make_inputs("softmax_attention"), dict(causal=False, window=window, sinks=sinks)
    want = run_reference("softmax_attention", x, **options)
    assert relative_error(attend(to_torch(x), **options), want) < RTOL


def test_merge_of_two_sets_of_keys():
    x = make_inputs("softmax_attention", T=20)
    q, k, v = x.values()
    parts = [
        reference.quadratic(q, k[:, s], v[:, s], causal=False)
        for s in (slice(0, 7), slice(7, None), slice(0, 0))
    ]
    both = reference.merge(*parts[0], *parts[1])
    assert relative_error(both, reference.online(q, k, v, causal=False)) < RTOL
    assert relative_error(reference.merge(*parts[2], *both), both) < RTOL
    assert reference.merge(*parts[2], *parts[2])[1].max() == -np.inf


@pytest.mark.parametrize("window", (48, 49, 1000))
def test_window_longer_than_the_sequence(window):
    x = inputs()
    assert relative_error(attend(x, window=window), attend(x)) < RTOL
    assert relative_error(attend(x, window=window, causal=False), attend(x, causal=False)) < RTOL


def test_window_of_one_sees_itself():
    x = inputs()
    assert max_error(attend(x, window=1)[0], x["v"]) < 1e-15


def test_sinks_with_the_smallest_window():
    x = inputs(T=12)
    want = attend({n: t[:, [0, 1, 2, 11]] for n, t in x.items()})[0][:, -1]
    assert relative_error(attend(x, window=1, sinks=3)[0][:, -1], want) < RTOL


@pytest.mark.parametrize("group", (1, 3))
def test_groups_are_repeated_heads(group):
    x = inputs(H=2 * group, HKV=2)
    repeated = x | {n: x[n].repeat_interleave(group, dim=2) for n in "kv"}
    assert relative_error(attend(x, window=9), attend(repeated, window=9)) < RTOL


def test_equal_scores_give_the_mean():
    x = inputs(H=1)
    o, lse = attend(x, scale=0.0)
    count = torch.arange(1, 49, dtype=torch.float64)
    assert relative_error(o[:, :, 0], x["v"][:, :, 0].cumsum(1) / count[:, None]) < RTOL
    assert relative_error(lse[0, :, 0], count.log()) < RTOL


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_huge_scores(impl, device):
    x = {n: t.to(device) for n, t in inputs(dtype="float32", T=20).items()}
    x["q"], x["k"] = 200 * x["q"], 200 * x["k"]
    x = {n: t.requires_grad_() for n, t in x.items()}
    o, lse = softmax_attention(**x, window=7, return_lse=True, impl=impl)
    assert lse.abs().max() > 1e4
    (o.sum() + lse.sum()).backward()
    assert all(t.isfinite().all() for t in (o, lse, *(t.grad for t in x.values())))


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_queries_that_see_nothing(impl, device):
    x = {n: t.to(device) for n, t in inputs(dtype="float32", T=20).items()}
    x |= {n: x[n][:, :8] for n in "kv"}
    x = {n: t.clone().requires_grad_() for n, t in x.items()}
    o, lse = softmax_attention(**x, return_lse=True, impl=impl)
    assert (o[:, :12] == 0).all() and (lse[:, :12] == -torch.inf).all()
    assert lse[:, 12:].isfinite().all()
    (o.square().sum() + lse[:, 12:].sum()).backward()
    assert all(t.grad.isfinite().all() for t in x.values()) and (x["q"].grad[:, :12] == 0).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("sizes", (dict(B=0, T=5), dict(T=0)), ids=str)
def test_nothing_in_nothing_out(impl, sizes, device):
    shape = dict(B=2, T=5) | sizes
    q = torch.zeros(shape["B"], shape["T"], 2, 8, device=device, requires_grad=True)
    o, lse = softmax_attention(q, q, q, return_lse=True, impl=impl)
    assert o.shape == q.shape and lse.shape == q.shape[:3]
    o.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("options", PATTERNS[:4], ids=str)
def test_queries_are_the_last_tokens(impl, options, device):
    x = {n: t.to(device) for n, t in inputs(dtype="float32").items()}
    whole = softmax_attention(**x, return_lse=True, impl=impl, **options)
    for n in (1, 19):
        some = softmax_attention(x["q"][:, -n:], x["k"], x["v"], return_lse=True, impl=impl, **options)
        assert relative_error(some, tuple(t[:, -n:] for t in whole)) < 1e-5


def test_learned_sink_is_a_key_without_a_value():
    x, sink = inputs(H=2), torch.tensor([0.5, -torch.inf], dtype=torch.float64)
    plain, (o, lse) = attend(x), attend(x, sink_logits=sink)
    assert relative_error(lse[..., 0], torch.logaddexp(plain[1][..., 0], sink[0])) < RTOL
    assert relative_error(o[..., 0, :], plain[0][..., 0, :] * (plain[1] - lse)[..., 0, None].exp()) < RTOL
    assert max_error(o[..., 1, :], plain[0][..., 1, :]) == 0


def test_softcap():
    x = inputs(H=1)
    s = torch.einsum("bthk,bjhk->btj", x["q"], x["k"]) / 4
    s = (2 * torch.tanh(s / 2)).masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
    o, lse = attend(x, softcap=2.0)
    assert relative_error(o[:, :, 0], s.softmax(-1) @ x["v"][:, :, 0]) < RTOL
    assert relative_error(lse[..., 0], s.logsumexp(-1)) < RTOL
    assert relative_error(attend(x, softcap=1e6), attend(x)) < 1e-9


def test_memory_does_not_grow_with_the_square():
    """Scores of a block of queries only: 4096 tokens would take 64 MB in one matrix."""
    x = {n: torch.randn(1, 4096, 1, 8) for n in "qkv"}
    with torch.profiler.profile(profile_memory=True) as seen:
        softmax_attention(**x, window=64, impl="torch")
    assert max(event.cpu_memory_usage for event in seen.events()) < 2**22


@pytest.mark.parametrize(
    "error, match, change",
    [
        (ValueError, "window is 0", dict(window=0)),
        (ValueError, "sinks is -1", dict(sinks=-1)),
        (ValueError, "softcap is 0", dict(softcap=0.0)),
        (
            ValueError,
            r"sink_logits has shape \(3,\), expected \[H\] = \(2,\)",
            dict(sink_logits=torch.zeros(3)),
        ),
        (ValueError, "q has 2 heads, expected a multiple of k's 3", dict(k=(1, 6, 3, 4), v=(1, 6, 3, 4))),
        (ValueError, r"k has shape \(1, 6, 2, 4\) and v has shape \(1, 6, 1, 4\)", dict(v=(1, 6, 1, 4))),
        (
            ValueError,
            "T = 6 and Tk = 9",
            dict(k=(1, 9, 2, 4), v=(1, 9, 2, 4), cu_seqlens=torch.tensor([0, 6])),
        ),
        (NotImplementedError, "K <= 256 and V <= 256, got 4 and 300", dict(v=(1, 6, 2, 300), impl="triton")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(error, match, change, device):
    x = {n: torch.zeros(change.get(n, (1, 6, 2, 4)), device=device) for n in "qkv"}
    more = {n: c.to(device) if torch.is_tensor(c) else c for n, c in change.items() if n not in x}
    with pytest.raises(error, match=match):
        softmax_attention(**x, **more)


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_operator_obeys_torch(impl, device):
    """opcheck: schema, fake shapes, autograd registration; with packed sequences, learned sinks and lse."""
    x = inputs(dtype="float32", **SMALL)
    tensors = [t.to(device).requires_grad_() for t in (*x.values(), torch.randn(2))]
    edges = torch.tensor([0, 0, 4, 6], device=device)
    arguments = (*tensors, edges, True, 3, 1, 1, 0.0, 0.5, impl)
    torch.library.opcheck(torch.ops.effattn_lite.softmax_attention.default, arguments)


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_compiles_forward_and_backward(impl, device):
    x = {n: t.to(device) for n, t in inputs(dtype="float32", **SMALL).items()}
    edges = torch.tensor([0, 4, 6], device=device)

    def loss(q, k, v):
        o, lse = softmax_attention(q, k, v, window=3, return_lse=True, cu_seqlens=edges, impl=impl)
        return o.square().sum() + lse.sum()

    def gradients(function):
        t = [a.clone().requires_grad_() for a in x.values()]
        return torch.autograd.grad(function(*t), t)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert relative_error(gradients(compiled), gradients(loss)) < 1e-6


def test_exports_as_one_node():
    layer, x = SoftmaxAttention(16, 2, window=4).eval(), torch.randn(1, 9, 16)
    program = torch.export.export(layer, (x,))
    nodes = [str(node.target) for node in program.graph.nodes]
    assert sum("effattn_lite.softmax_attention" in node for node in nodes) == 1
    assert relative_error(program.module()(x), layer(x)) < 1e-6


@pytest.mark.parametrize("options", (dict(kv_heads=1), dict(head_dim=6), dict(rope_theta=None)), ids=str)
def test_layer_options(options):
    layer, x = SoftmaxAttention(16, 2, **options).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    cache, steps = None, []
    for t in range(9):
        y, cache = layer.step(x[:, t], cache)
        steps.append(y)
    assert relative_error(torch.stack(steps, dim=1), layer(x)) < RTOL


def test_layer_depends_on_distance_alone():
    """Rotary positions: tokens moved as a whole see each other alike."""
    layer, x = SoftmaxAttention(16, 2, window=4).double(), torch.randn(1, 12, 16, dtype=torch.float64)
    assert relative_error(layer(x[:, 5:])[:, 3:], layer(x)[:, 8:]) < RTOL
