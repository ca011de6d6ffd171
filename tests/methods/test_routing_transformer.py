"""What is special to the Routing Transformer: its clusters, the mean over them, and centroids that move."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.routing_transformer import RoutingTransformer
from effattn_lite.ops import routing_transformer, softmax_attention
from effattn_lite.ops.routing_transformer import members, update
from effattn_lite.reference import routing_transformer as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("routing_transformer", **sizes))


def norm(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("T", (1, 17, 48))
def test_reduces_to_softmax_attention(T, causal):
    """Clusters of all tokens: M times the same attention, so the sum of denominators is M times one."""
    x = inputs(T=T, M=5)
    o, lse = routing_transformer(**x, window=48, causal=causal, return_lse=True)
    q, k = norm(x["q"]), norm(x["k"])
    want, one = softmax_attention(q, k, x["v"], causal=causal, return_lse=True, impl="torch")
    assert relative_error(o, want) < RTOL
    assert relative_error(lse, one + np.log(5)) < RTOL


def test_by_hand():
    """On two channels a normalised token is (1, -1) or (-1, 1): signs + + - + -, two clusters of two."""
    sign = torch.tensor([1.0, 1, -1, 1, -1]).double()
    q, v = torch.stack((sign, -sign), dim=-1)[None, :, None], torch.arange(1.0, 6).double().view(1, 5, 1, 1)
    centroids = torch.tensor([[[1.0, -1], [-1, 1]]]).double()
    assert members(3 * q, centroids=centroids, window=2).tolist() == [[[[0, 1], [2, 4]]]]
    o, lse = routing_transformer(q, q, v, centroids=centroids, window=2, scale=1.0, return_lse=True)
    # the scores of a cluster are all the same; nobody calls token 3
    assert torch.allclose(o.flatten(), torch.tensor([1, 1.5, 3, 0, 4]).double())
    score = 2 / (1 + 1e-5)
    want = torch.tensor([score, score + np.log(2), score, -np.inf, score + np.log(2)]).double()
    assert torch.allclose(lse.flatten(), want)
    both = routing_transformer(q, q, v, centroids=centroids, window=2, causal=False)
    assert torch.allclose(both.flatten(), torch.tensor([1.5, 1.5, 4, 0, 4]).double())


def test_ties_go_to_the_earlier_token():
    zeros = torch.zeros(2, 9, 3, 4)
    assert (members(zeros, centroids=torch.randn(3, 5, 4), window=4) == torch.arange(4)).all()


@pytest.mark.parametrize("causal", (True, False))
def test_the_mean_of_a_tokens_clusters(causal):
    """Cluster by cluster with softmax attention of the gathered tokens, then the mean, token by token."""
    x, w, M = inputs(B=1, T=31, H=2, M=6), 9, 6
    rows = members(x["q"], centroids=x["centroids"], window=w)[0]
    columns = rows if causal else members(x["k"], centroids=x["centroids"], window=w)[0]
    q, k, v = norm(x["q"]), norm(x["k"]), x["v"]
    o, lse = routing_transformer(**x, window=w, causal=causal, return_lse=True)
    several = 0
    for t, h in np.ndindex(31, 2):
        found, mass = [], []
        for m in range(M):
            if t in rows[h, m]:
                j = [int(j) for j in columns[h, m] if j <= t or not causal]
                s = 16**-0.5 * k[0, j, h] @ q[0, t, h]
                found.append(s.softmax(0) @ v[0, j, h])
                mass.append(s.logsumexp(0))
        several += len(found) > 1
        want = torch.stack(found).mean(0) if found else 0 * v[0, t, h]
        assert max_error(o[0, t, h], want) < RTOL
        assert max_error(lse[0, t, h], torch.stack(mass).logsumexp(0) if mass else -torch.inf) < RTOL
    assert several and lse.isneginf().any()


def test_no_value_comes_from_later():
    """The queries choose; what later keys and values hold changes nothing before them."""
    x, t = inputs(T=45), 20
    o, lse = routing_transformer(**x, window=9, return_lse=True)
    x["k"], x["v"] = x["k"].clone(), x["v"].clone()
    x["k"][:, t:], x["v"][:, t:] = -x["k"][:, t:], 7
    after = routing_transformer(**x, window=9, return_lse=True)
    assert max_error((after[0][:, :t], after[1][:, :t]), (o[:, :t], lse[:, :t])) == 0
    assert max_error(after[0][:, t:], o[:, t:]) > 1


def test_later_queries_compete():
    """Why the registry does not call it causal: a later token, if nearer, takes an earlier one's place."""
    x, t = inputs(T=45), 20
    o = routing_transformer(**x, window=9)
    x["q"] = x["q"].clone()
    x["q"][:, t:] = -x["q"][:, t:]
    assert max_error(routing_transformer(**x, window=9)[:, :t], o[:, :t]) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_selection_and_update_equal_reference(seed):
    x = make_inputs("routing_transformer", seed=seed, T=37)
    y = to_torch(x)
    want = reference.members(x["q"], x["centroids"], window=7)
    assert np.array_equal(members(y["q"], centroids=y["centroids"], window=7).numpy(), want)
    moved = reference.update(x["centroids"], x["q"], x["k"], decay=0.9)
    assert relative_error(update(y["centroids"], y["q"], y["k"], decay=0.9), moved) < RTOL


def test_update_by_hand():
    """Three tokens, two centroids: one moves half-way to its tokens, the other has none and stays."""
    q = torch.tensor([[1.0, -1, 0], [1, 0, -1], [1, -1, 0]]).double()[None, :, None]
    centroids = torch.tensor([[[1.0, 0, -1], [-2, 1, 1]]]).double()
    x = norm(q)[0, :, 0]
    assert (x @ centroids[0].T).argmax(-1).tolist() == [0, 0, 0]
    want = 0.5 * centroids[0, 0] + 0.5 * x.mean(0)
    want = want * 3**0.5 / want.norm()
    moved = update(centroids, q, q, decay=0.5)
    assert max_error(moved[0, 0], want) < RTOL and torch.equal(moved[0, 1], centroids[0, 1])


def test_centroids_find_the_groups():
    """Spherical k-means on tokens around three directions: each token ends near some centroid."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randn(3, 16, generator=generator)[torch.arange(90) % 3]
    x = (group + 0.1 * torch.randn(90, 16, generator=generator))[None, :, None]
    centroids = norm(torch.randn(1, 6, 16, generator=generator))

    def nearness():
        return float((norm(x)[0, :, 0] @ centroids[0].T).amax(-1).mean() / 16)

    before = nearness()
    for _ in range(20):
        centroids = update(centroids, x, x, decay=0.5)
    assert nearness() > 0.95 > before
    assert torch.allclose(centroids.norm(dim=-1), torch.tensor(4.0))


def test_zeros_have_finite_gradients():
    x = {name: torch.zeros_like(y).requires_grad_() for name, y in inputs(T=12).items()}
    o, lse = routing_transformer(**x, window=4, return_lse=True)
    (o.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(y.grad is None or y.grad.isfinite().all() for y in x.values())


def test_layer_moves_its_centroids_in_training_alone():
    layer, x = RoutingTransformer(32, 4, window=8, clusters=5, decay=0.5), torch.randn(2, 40, 32)
    assert layer.centroids.shape == (2, 5, 8) and "centroids" in layer.state_dict()
    start = layer.centroids.clone()
    y = layer(x)
    q = layer.q_proj(x).unflatten(-1, (4, 8))[:, :, 2:]
    assert relative_error(layer.centroids, update(start, q, q, decay=0.5)) < 1e-6
    layer.eval()
    moved = layer.centroids.clone()
    layer(x)
    assert torch.equal(layer.centroids, moved)
    layer.centroids.copy_(start)
    assert max_error(layer(x), y) == 0  # the first call used them before it moved them


@pytest.mark.parametrize("causal", (True, False))
def test_layer_packs_sequences(causal):
    layer = RoutingTransformer(32, 4, window=6, clusters=5, causal=causal).double().eval()
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    alone = torch.cat((layer(x[:, :13]), layer(x[:, 13:])), dim=1)
    assert relative_error(layer(x, cu_seqlens=torch.tensor([0, 13, 13, 40])), alone) < RTOL


def test_errors():
    x = inputs(B=1, T=9)
    for bad, match in (
        (dict(window=0), "window is 0, expected >= 1"),
        (
            dict(centroids=x["centroids"][:1]),
            r"centroids has shape \(1, 12, 16\), expected .* = \(2, 12, 16\)",
        ),
        (dict(centroids=x["centroids"][..., :3]), r"centroids has shape \(2, 12, 3\)"),
        (dict(k=x["k"][:, :, :1]), r"k has shape \(1, 9, 1, 16\), expected .* = \(1, 9, 2, 16\)"),
    ):
        with pytest.raises(ValueError, match=match):
            routing_transformer(**{**x, "window": 4, **bad})
    with pytest.raises(ValueError, match="window is -1"):
        members(x["q"], centroids=x["centroids"], window=-1)
    with pytest.raises(ValueError, match="centroids has shape"):
        update(x["centroids"][:1], x["q"], x["k"], decay=0.9)
    with pytest.raises(NotImplementedError, match="no kernel"):
        routing_transformer(**x, window=4, impl="triton")
    with pytest.raises(ValueError, match="local_heads is 4, expected 1 to heads - 1 = 3"):
        RoutingTransformer(32, 4, local_heads=4)
    with pytest.raises(ValueError, match="width is 30, expected a multiple of heads = 4"):
        RoutingTransformer(30, 4)
