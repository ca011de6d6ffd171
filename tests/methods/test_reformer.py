"""What is special to Reformer: its hashes, a merge that counts no pair twice, and what causal means."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.reformer import Reformer
from effattn_lite.ops import reformer, softmax_attention
from effattn_lite.ops.reformer import EPSILON, hashes
from effattn_lite.reference import reformer as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("reformer", **sizes))


def keys(q):
    return q / (q.square().sum(-1, keepdim=True) + EPSILON).sqrt()


def brute(q, v, sets, scale=None):
    """Token by token: one softmax over its set, or itself where the set is empty."""
    k, (B, T, H, K) = keys(q), q.shape
    scale, o, lse = scale or K**-0.5, torch.zeros_like(v), q.new_zeros(B, T, H)
    for b, t, h in np.ndindex(B, T, H):
        j = sorted(sets(b, t, h)) or [t]
        s = scale * k[b, j, h] @ q[b, t, h]
        o[b, t, h], lse[b, t, h] = s.softmax(0) @ v[b, j, h], s.logsumexp(0)
    return o, lse


def test_by_hand():
    """Directions east, north, east, west, east, on two axes: buckets 0, 1, 0, 2, 0."""
    east, north = torch.tensor([2.0, 0.5]), torch.tensor([0.1, 1.0])
    q = torch.stack((east, north, 3 * east, -east, east)).double()[None, :, None]
    v, omega = torch.arange(1.0, 6).double().view(1, 5, 1, 1), torch.eye(2)[None]
    assert hashes(q, omega=omega, rounds=1).flatten().tolist() == [0, 1, 0, 2, 0]
    # the last token sees tokens 0 and 2, whose keys are one; all others see one token, themselves if need be
    o = reformer(q, v, omega=omega, rounds=1, chunk_size=5)
    assert torch.allclose(o.flatten(), torch.tensor([1, 2, 1, 4, 2.0]).double())
    o = reformer(q, v, omega=omega, rounds=1, chunk_size=5, causal=False)
    own = torch.tensor([4, 2, 3, 4, 2.0]).double()
    assert torch.allclose(o.flatten(), own)
    # sorted 0 2 4 1 3 in chunks of one: a token sees one back, and only in its bucket
    o = reformer(q, v, omega=omega, rounds=1, chunk_size=1)
    assert torch.allclose(o.flatten(), torch.tensor([1, 2, 1, 4, 3.0]).double())


def test_ties_go_to_the_lower_bucket():
    assert not hashes(torch.zeros(2, 9, 3, 4), omega=torch.randn(3, 6, 4), rounds=2).any()
    # axes 1 and 2 are one: of bucket 1 and 2, and of 4 and 5, the lower
    omega = torch.eye(3)[[0, 1, 1]][None]
    q = torch.tensor([[0.1, 1, 0], [0.1, -1, 0]])[None, :, None]
    assert hashes(q, omega=omega, rounds=1).flatten().tolist() == [1, 4]


def test_hashes_are_of_directions():
    x = make_inputs("reformer", M=24)
    bucket = reference.hashes(x["q"], x["omega"], rounds=3)
    assert np.array_equal(reference.hashes(5 * x["q"], x["omega"], rounds=3), bucket)
    # the opposite direction lies in the opposite bucket, of 8 axes
    assert np.array_equal(reference.hashes(-x["q"], x["omega"], rounds=3), (bucket + 8) % 16)
    got = hashes(torch.tensor(x["q"]), omega=torch.tensor(x["omega"]), rounds=3)
    assert np.array_equal(got.numpy(), bucket)


@pytest.mark.parametrize("T", (1, 2, 31, 48))
def test_one_bucket_in_one_chunk_is_attention_without_self(T):
    """Token t sees tokens 0 to t - 1: softmax attention of the others, one step late."""
    x = inputs(T=T)
    x["omega"] = torch.zeros_like(x["omega"])
    o, lse = reformer(**x, rounds=2, chunk_size=64, return_lse=True)
    q, v = x["q"], x["v"]
    want = softmax_attention(q[:, 1:], keys(q)[:, :-1], v[:, :-1], return_lse=True, impl="torch")
    assert relative_error((o[:, 1:], lse[:, 1:]), want) < RTOL
    assert max_error(o[:, 0], v[:, 0]) == 0
    own = q.shape[3] ** -0.5 * (q * keys(q)).sum(-1)
    assert relative_error(lse[:, 0], own[:, 0]) < RTOL


@pytest.mark.parametrize("causal", (True, False))
def test_one_bucket_in_chunks_looks_one_back(causal):
    x, C = inputs(B=1, T=23), 5
    x["omega"] = torch.zeros_like(x["omega"])

    def sets(b, t, h):
        span = range((t // C - 1) * C, (t // C + 1) * C)
        return {j for j in span if 0 <= j < 23 and (j < t if causal else j != t)}

    got = reformer(**x, rounds=1, chunk_size=C, causal=causal, return_lse=True)
    assert relative_error(got, brute(x["q"], x["v"], sets)) < RTOL


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("rounds, chunk_size", ((1, 5), (3, 4), (4, 7), (12, 3)))
def test_merge_is_one_softmax_over_the_union(rounds, chunk_size, causal):
    """Sets built token by token from sorted lists, as the text says it; a pair of two rounds counts once."""
    x = inputs(B=2, T=29, H=2)
    bucket = hashes(x["q"], omega=x["omega"], rounds=rounds)
    twice = 0

    def sets(b, t, h):
        nonlocal twice
        found = []
        for r in range(rounds):
            name = bucket[b, :, h, r].tolist()
            order = sorted(range(29), key=lambda j: (name[j], j))
            chunk = order.index(t) // chunk_size
            near = order[max(chunk - 1, 0) * chunk_size : (chunk + 1) * chunk_size]
            found += [j for j in near if name[j] == name[t] and (j < t if causal else j != t)]
        twice += len(found) - len(set(found))
        return set(found)

    got = reformer(**x, rounds=rounds, chunk_size=chunk_size, causal=causal, return_lse=True)
    assert relative_error(got, brute(x["q"], x["v"], sets)) < RTOL
    assert rounds == 1 or twice > 0


def test_a_round_twice_is_once():
    x = inputs(T=40)
    more = dict(chunk_size=6, return_lse=True)
    once = reformer(**x, rounds=1, **more)
    x["omega"] = x["omega"].repeat(1, 3, 1)
    assert relative_error(reformer(**x, rounds=3, **more), once) < RTOL


def test_no_value_comes_from_later():
    """What a later token holds, and its length, change nothing; its direction stays, so the order does."""
    x, t = inputs(T=45), 20
    more = dict(omega=x["omega"], rounds=3, chunk_size=6, return_lse=True)
    q, v = x["q"].clone(), x["v"].clone()
    q[:, t:] *= 3
    v[:, t:] = 7
    o, lse = reformer(q, v, **more)
    want = reformer(x["q"], x["v"], **more)
    assert relative_error((o[:, :t], lse[:, :t]), tuple(y[:, :t] for y in want)) < RTOL
    assert max_error(o[:, t:], want[0][:, t:]) > 1
    grad = torch.autograd.grad(reformer(q, v.requires_grad_(), **more)[0][:, :t].sum(), v)[0]
    assert max_error(grad[:, t:], 0 * grad[:, t:]) == 0 < grad[:, :t].abs().max()


def test_later_directions_move_the_edges_of_chunks():
    """Why the registry does not call it causal: another later direction, another earlier set."""
    x, t = inputs(T=45), 20
    more = dict(omega=x["omega"][:, :2], rounds=1, chunk_size=2)  # 4 buckets, longer than chunks
    q = x["q"].clone()
    q[:, t:] = -q[:, t:]
    change = max_error(reformer(q, x["v"], **more)[:, :t], reformer(x["q"], x["v"], **more)[:, :t])
    assert change > 1e-3


def test_recall_beats_random_buckets():
    """Of each token's 8 nearest, more are seen than by hashes of other tokens, and more in more rounds."""
    rng, T, K, H = np.random.default_rng(0), 256, 16, 2
    q = rng.normal(size=(1, T, H, K))
    unit = q / np.linalg.norm(q, axis=-1, keepdims=True)
    cos = np.einsum("bthk,bjhk->btjh", unit, unit) - 2 * np.eye(T)[..., None]
    nearest = np.argsort(-cos, axis=2)[:, :, :8]

    def recall(hashed, rounds):
        omega = np.random.default_rng(1).normal(size=(H, rounds * 4, K))
        seen = reference.counts(hashed, omega, rounds=rounds, chunk_size=64, causal=False) > 0
        return np.take_along_axis(seen, nearest, axis=2).mean(), seen.mean()

    found = {rounds: recall(q, rounds) for rounds in (1, 4)}
    blind, share = recall(rng.normal(size=q.shape), 4)
    assert abs(blind - share) < 0.05  # hashes of other tokens find as many as they see
    assert found[4][0] > 1.5 * found[4][1] and found[4][0] > blind + 0.2
    assert found[4][0] > found[1][0] + 0.2


def test_layer_keeps_its_directions():
    first, same = (Reformer(32, 4, seed=3, buckets=8, rounds=2, chunk_size=4) for _ in range(2))
    assert torch.equal(first.omega, same.omega) and first.omega.shape == (4, 8, 8)
    other = Reformer(32, 4, seed=4, buckets=8, rounds=2, chunk_size=4)
    assert not torch.equal(first.omega, other.omega)
    other.load_state_dict(first.state_dict())
    x = torch.randn(1, 30, 32)
    assert max_error(other(x), first(x)) == 0
    edges = torch.tensor([0, 13, 13, 30])
    alone = torch.cat((first(x[:, :13]), first(x[:, 13:])), dim=1)
    assert relative_error(first(x, cu_seqlens=edges), alone) < 1e-5


def test_errors():
    x = {name: y[:1] if name != "omega" else y for name, y in inputs(T=9).items()}
    for bad, match in (
        (dict(rounds=5), "rounds is 5, expected a divisor of omega's M = 12"),
        (dict(rounds=0), "rounds is 0"),
        (dict(chunk_size=0), "chunk_size is 0, expected >= 1"),
        (dict(omega=x["omega"][:1]), r"omega has shape \(1, 12, 16\), expected .* = \(2, 12, 16\)"),
        (dict(v=x["v"][:, :, :1]), r"v has shape \(1, 9, 1, 24\), expected .* = \(1, 9, 2, 24\)"),
    ):
        with pytest.raises(ValueError, match=match):
            reformer(**{**x, "rounds": 2, **bad})
    with pytest.raises(ValueError, match="rounds is 7"):
        hashes(x["q"], omega=x["omega"], rounds=7)
    with pytest.raises(NotImplementedError, match="no kernel"):
        reformer(**x, rounds=2, impl="triton")
    with pytest.raises(ValueError, match="buckets is 7, expected an even number"):
        Reformer(32, 4, buckets=7)
    with pytest.raises(ValueError, match="width is 30, expected a multiple of heads = 4"):
        Reformer(30, 4)
