"""Outside truth: the LSH attention of Hugging Face's Reformer, on its own hashes.

It lets all tokens of two chunks see each other, lets the first chunk look back at the last one, and counts a
pair in every round that holds it. Where buckets or the causal mask rule these out, it is run as it is; else a
mask takes out the first two, and the third is put into what it is compared with.
"""

import numpy as np
import pytest
import torch

from effattn_lite.ops.reformer import hashes, reformer
from effattn_lite.reference import reformer as reference
from effattn_lite.testing import relative_error

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")

H, K, T, C = 2, 8, 32, 8


def peer(*, rounds, buckets=8, chunk_length=C, masked=False):
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=H * K, num_attention_heads=H, attention_head_size=K, num_hashes=rounds,
        num_buckets=buckets, lsh_attn_chunk_length=chunk_length, is_decoder=True, hash_seed=5,
        lsh_attention_probs_dropout_prob=0.0, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = (masking(LSHSelfAttention) if masked else LSHSelfAttention)(config, layer_idx=0).double().eval()
    for projection in (layer.query_key, layer.value):
        torch.nn.init.normal_(projection.weight)
    return layer


def masking(base):
    class Masked(base):
        """The peer, with a mask for other buckets and for the look back round the end."""

        def _compute_attn_mask(self, rows, columns, *more):
            seen, rounds = super()._compute_attn_mask(rows, columns, *more), self.num_hashes
            for name in range(rounds):
                part = slice(name * T // C, (name + 1) * T // C)
                own = [self.bucket[..., name].gather(2, x[:, :, part].flatten(2)) for x in (rows, columns)]
                own = [x.view(*x.shape[:2], T // C, -1) for x in own]
                seen[:, :, part] &= own[0][..., None] == own[1][..., None, :]
                seen[:, :, name * T // C, :, :C] = False
            return seen

    return Masked


def both(layer, x, *, rounds, buckets=None):
    """Its output, and the tensors of ours: q and v [B, T, H, K]."""
    q, v = (projection(x).unflatten(-1, (H, K)) for projection in (layer.query_key, layer.value))
    o = layer(x, num_hashes=rounds, buckets=buckets).hidden_states.unflatten(-1, (H, K))
    return o, q, v


def limit(q):
    """Its keys are x over the root of |x|^2 + 1e-6 K, ours of |x|^2 + 1e-6; outputs move twice as much."""
    length = q.norm(dim=-1)
    return float(2 * length.max() * 0.5e-6 * K / length.min() ** 2)


def draw(tokens=T):
    return 0.3 * torch.randn(
        2, tokens, H * K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def directions(rounds, buckets=8):
    """The peer's rotations, in its order of draws, as omega."""
    torch.manual_seed(5)
    drawn = torch.randn(H, K, rounds, buckets // 2, dtype=torch.float64)
    return drawn.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_text_within_a_chunk():
    layer, x = peer(rounds=1), draw(C)
    want, q, v = both(layer, x, rounds=1)
    omega = torch.zeros(H, 4, K).double()
    assert relative_error(reformer(q, v, omega=omega, rounds=1, chunk_size=C, scale=1.0), want) < limit(q)


@torch.no_grad()
@pytest.mark.parametrize("rounds", (1, 3))
def test_one_bucket(rounds):
    """All tokens in one bucket: chunks of the text itself, and rounds that are all the same."""
    layer, x = peer(rounds=rounds), draw()
    buckets = (8 * torch.arange(rounds)).view(1, 1, -1, 1).expand(2, H, rounds, T).reshape(2, H, -1)
    want, q, v = both(layer, x, rounds=rounds, buckets=buckets)
    omega = torch.zeros(H, 4 * rounds, K).double()
    assert relative_error(reformer(q, v, omega=omega, rounds=rounds, chunk_size=C, scale=1.0), want) < limit(
        q
    )


@torch.no_grad()
def test_hashes():
    layer, x = peer(rounds=3), draw()
    q = layer.query_key(x).unflatten(-1, (H, K))
    want = layer._hash_vectors(q.transpose(1, 2), 3, None).view(2, H, 3, T) % 8
    assert torch.equal(hashes(q, omega=directions(3), rounds=3), want.permute(0, 3, 1, 2))


@torch.no_grad()
def test_one_round():
    layer, x, omega = peer(rounds=1, masked=True), draw(), directions(1)
    layer.bucket = hashes(layer.query_key(x).unflatten(-1, (H, K)), omega=omega, rounds=1).transpose(1, 2)
    want, q, v = both(layer, x, rounds=1)
    assert relative_error(reformer(q, v, omega=omega, rounds=1, chunk_size=C, scale=1.0), want) < limit(q)


@torch.no_grad()
def test_rounds():
    """Several rounds, where the peer counts a pair N times: its weight is N times that of the union."""
    layer, x, omega = peer(rounds=3, masked=True), draw(), directions(3)
    layer.bucket = hashes(layer.query_key(x).unflatten(-1, (H, K)), omega=omega, rounds=3).transpose(1, 2)
    want, q, v = both(layer, x, rounds=3)
    N = reference.counts(q.numpy(), omega.numpy(), rounds=3, chunk_size=C)
    assert N.max() > 1
    N = torch.tensor(N + np.eye(T, dtype=int)[..., None] * (N.sum(2, keepdims=True) == 0))
    k = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    s = torch.einsum("bthk,bjhk->btjh", q, k)
    assert relative_error(torch.einsum("btjh,bjhv->bthv", (s + N.log()).softmax(2), v), want) < limit(q)
    # the same, each pair counted once, is what the op gives
    once = torch.einsum("btjh,bjhv->bthv", (s + N.clamp(max=1).log()).softmax(2), v)
    assert relative_error(reformer(q, v, omega=omega, rounds=3, chunk_size=C, scale=1.0), once) < 1e-10
