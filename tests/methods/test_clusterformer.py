"""What is special to ClusterFormer: its clustering, its blocks of sorted words, and losses that teach it."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.clusterformer import ClusterFormer
from effattn_lite.ops import clusterformer, softmax_attention
from effattn_lite.ops.clusterformer import cluster
from effattn_lite.reference import clusterformer as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("clusterformer", **sizes))


def brute(x, choice, M):
    """Block by block of Python's own stable sort, with softmax attention of the gathered words."""
    q, k, v = x["q"], x["k"], x["v"]
    (B, T, H, _), o = q.shape, torch.zeros_like(v)
    lse, n = q.new_zeros(B, T, H), -(-T // M)
    for b in range(B):
        order = sorted(range(T), key=lambda t: (int(choice[b, t]), t))
        for start in range(0, T, n):
            first = max(start, n) - n
            rows, columns = order[start : start + n], order[first : first + 2 * n]
            parts = q[b : b + 1, rows], k[b : b + 1, columns], v[b : b + 1, columns]
            found = softmax_attention(*parts, causal=False, return_lse=True, impl="torch")
            o[b, rows], lse[b, rows] = found[0][0], found[1][0]
    return o, lse


@pytest.mark.parametrize("T, M", ((48, 1), (48, 2), (17, 2), (1, 2), (1, 5), (7, 1)))
def test_reduces_to_softmax_attention(T, M):
    x = inputs(T=T, M=M)
    want = softmax_attention(x["q"], x["k"], x["v"], causal=False, return_lse=True, impl="torch")
    assert relative_error(clusterformer(**x, return_lse=True), want) < RTOL


@pytest.mark.parametrize("T, M", ((48, 6), (47, 7), (37, 12), (5, 12), (30, 4)))
def test_blocks_of_the_sorted_words(T, M):
    x = inputs(T=T, M=M)
    choice = cluster(x["x"], centroids=x["centroids"], w=x["w"])[1]
    assert len(choice.unique()) > 1
    assert relative_error(clusterformer(**x, return_lse=True), brute(x, choice, M)) < RTOL


def test_by_hand():
    """Words east, north, east, north: each centroid finds its direction, and the sort puts likes together."""
    east, north = torch.tensor([2.0, 0]).double(), torch.tensor([0, 1.0]).double()
    words, v = torch.stack((east, north, east, north))[None], torch.arange(1.0, 5).double().view(1, 4, 1, 1)
    c, w = 50 * torch.stack((north, east))[None], torch.eye(2).double()
    moved, choice = cluster(words, centroids=c, w=w)
    assert torch.allclose(moved, torch.stack((north, east))[None]) and choice.tolist() == [[1, 0, 1, 0]]
    zeros = torch.zeros(1, 4, 1, 3).double()
    # four clusters, blocks of one word in the order 1 3 0 2: each sees itself and the one before
    more = torch.cat((c, -c), dim=1)
    choice = cluster(words, centroids=more, w=w)[1]
    assert choice.tolist() == [[1, 0, 1, 0]]
    o = clusterformer(zeros, zeros, v, x=words, centroids=more, w=w)
    assert torch.allclose(o.flatten(), torch.tensor([2.5, 3, 2, 3]).double())


def test_membership_between_its_limits():
    """Centroids of zeros mix all words alike; very long ones take the one word that is most like them."""
    x = inputs(T=20)
    words, c, w = x["x"], x["centroids"], x["w"]
    moved, choice = cluster(words, centroids=0 * c, w=w)
    assert relative_error(moved, (words.mean(1, keepdim=True) @ w).expand(moved.shape)) < RTOL
    assert not choice.any()  # all centroids are one: the lowest
    nearest = torch.einsum("bmd,btd->bmt", c, words).argmax(-1)
    hard = torch.stack([words[b, nearest[b]] for b in range(2)]) @ w
    assert relative_error(cluster(words, centroids=1e6 * c, w=w)[0], hard) < RTOL


@pytest.mark.parametrize("seed", range(3))
def test_clustering_equals_reference(seed):
    x = make_inputs("clusterformer", seed=seed, T=37)
    moved, choice = reference.cluster(x["x"], x["centroids"], x["w"])
    got = cluster(**{n: torch.tensor(x[n]) for n in ("x", "centroids", "w")})
    assert relative_error(got[0], moved) < RTOL and np.array_equal(got[1].numpy(), choice)


def test_centroids_of_one_text_or_of_each():
    x = inputs(B=1, T=30, M=4)
    c, edges = torch.randn(3, 4, 20).double(), torch.tensor([0, 11, 11, 30])
    packed = clusterformer(**x | {"centroids": c}, cu_seqlens=edges)
    for n, span in ((0, slice(0, 11)), (2, slice(11, 30))):
        part = {name: x[name][:, span] for name in ("q", "k", "v", "x")}
        alone = clusterformer(**part, centroids=c[n : n + 1], w=x["w"])
        assert relative_error(packed[:, span], alone) < RTOL
    twice = {name: torch.cat((x[name], 2 * x[name])) for name in ("q", "k", "v", "x")}
    shared = clusterformer(**twice, centroids=c[:1], w=x["w"])
    each = clusterformer(**twice, centroids=c[:1].expand(2, -1, -1), w=x["w"])
    assert max_error(shared, each) == 0


def test_the_output_does_not_teach_the_clusters():
    x = {name: y.requires_grad_() for name, y in inputs(T=20).items()}
    clusterformer(**x).sum().backward()
    assert all(x[name].grad is not None for name in "qkv")
    assert all(x[name].grad is None for name in ("x", "centroids", "w"))


def test_the_loss_teaches_the_clusters():
    """Words around four directions: a few steps bring every word nearer to the centroid of its cluster."""
    torch.manual_seed(0)
    group = torch.randn(4, 32)[torch.arange(64) % 4]
    x, layer = (group + 0.1 * torch.randn(64, 32))[None], ClusterFormer(32, 4, clusters=8)
    step = torch.optim.Adam([layer.c, layer.w], lr=0.02)

    def nearness():
        moved, choice = cluster(x, centroids=layer.c[None], w=layer.w)
        return float(torch.cosine_similarity(x[0], moved[0, choice[0]], dim=-1).mean().detach())

    before, first = nearness(), float(layer.loss(x).detach())
    for _ in range(50):
        step.zero_grad()
        layer.loss(x).backward()
        step.step()
    assert float(layer.loss(x).detach()) < first - 0.3 and nearness() > before + 0.2


def test_loss_by_hand():
    layer = ClusterFormer(2, 1, clusters=2).double()
    with torch.no_grad():
        layer.c.copy_(100 * torch.eye(2))
        layer.w.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0.8, 0.6]]]).double()
    # centroids become (1, 0), of two equal words, and (0, 1): cosines 1, 1, 1, 0.8, and 0 between them
    assert abs(float(layer.loss(x).detach()) + 3.8 / 4) < 1e-3
    layer = ClusterFormer(2, 1, clusters=1).double()
    assert float(layer.loss(x).detach()) > -1  # one centroid has no neighbour


def test_layers_hand_on_their_centroids():
    first, second = ClusterFormer(32, 4, clusters=5), ClusterFormer(32, 4, clusters=5)
    x = torch.randn(2, 40, 32)
    c = first.move(x)
    assert c.shape == (2, 5, 32) and torch.equal(c, cluster(x, centroids=first.c[None], w=first.w)[0])
    assert max_error(second(x, c), second(x)) > 1e-3
    second.loss(x, c).backward()
    assert float(first.c.grad.abs().max()) > 0  # through the layer behind as well
    edges = torch.tensor([0, 13, 13, 40])
    alone = torch.cat((first(x[:1, :13]), first(x[:1, 13:])), dim=1)
    assert relative_error(first(x[:1], cu_seqlens=edges), alone) < 1e-5


def test_errors():
    x = inputs(T=9)
    for bad, match in (
        (
            dict(centroids=x["centroids"][0]),
            r"centroids has shape \(12, 20\), expected \[1 or 2, M, D = 20\]",
        ),
        (dict(centroids=x["centroids"].repeat(2, 1, 1)), r"centroids has shape \(4, 12, 20\)"),
        (dict(centroids=x["centroids"][:, :0]), "expected M >= 1"),
        (dict(w=x["w"][:3]), r"w has shape \(3, 20\), expected .* = \(20, 20\)"),
        (dict(x=x["x"][:, :5]), r"q has shape \(2, 9, 2, 16\), expected .* = \(2, 5, 2, 16\) as x"),
        (dict(k=x["k"][:, :, :1]), r"k has shape \(2, 9, 1, 16\), expected .* = \(2, 9, 2, 16\)"),
    ):
        with pytest.raises(ValueError, match=match):
            clusterformer(**{**x, **bad})
    with pytest.raises(NotImplementedError, match="no kernel"):
        clusterformer(**x, impl="triton")
    with pytest.raises(ValueError, match="width is 30, expected a multiple of heads = 4"):
        ClusterFormer(30, 4)
